"""The run that --resume names: its folder, its name under logs/, or anything that lies in it."""

import difflib
import re
from pathlib import Path

from ldm.errors import UserError

CONFIG = "config.yaml"  # what makes a folder a run
DEPTH = 2  # levels of a run's folder in which a named file may lie: checkpoints/step-00000004.ckpt


def find_run(given: str | Path, *, logs: Path = Path("logs")) -> Path:
    """What --resume names -> the folder of the run. Raises UserError if that is no run.

    A run continues from its newest checkpoint, so an older one that is named is refused.
    """
    for path in (Path(given), logs / given):
        around = [path, *(parent for parent in path.parents if parent != Path())][: DEPTH + 1]
        folder = next((p for p in around if (p / CONFIG).is_file()), None)
        if folder is not None:
            _check_newest(path, folder)
            return folder
    known = sorted(_name(path.parent, logs) for path in _configs(logs))
    near = difflib.get_close_matches(str(given), known, n=1)
    listed = f"did you mean `{near[0]}`" if near else f"under {logs}/: {', '.join(known) or 'none'}"
    remedy = f"A run is a folder that main.py has made, with {CONFIG} in it; {listed}."
    raise UserError("There is no such run", where=given, remedy=remedy)


def _check_newest(path: Path, folder: Path) -> None:
    """Raises UserError if `path` is a checkpoint, but not the newest of the run, or is not there."""
    if path.suffix != ".ckpt":
        if not path.exists():
            raise UserError("There is no such file in the run", where=path, remedy=f"Give {folder}.")
        return
    steps = {file: _step(file) for file in (folder / "checkpoints").glob("*.ckpt")}
    newest = max(steps, key=steps.__getitem__, default=None)
    if newest is None or not path.exists():
        found = f"the newest is {newest.name}" if newest else "it has none yet"
        raise UserError("There is no such checkpoint", where=path, remedy=f"Give the run, {folder}; {found}.")
    if steps.get(path, -1) < steps[newest]:
        what = f"A run continues from its newest checkpoint, {newest.name}"
        raise UserError(what, where=path, remedy=f"Give {folder}, or remove the later checkpoints.")


def _step(file: Path) -> int:
    named = re.search(r"step[-=](\d+)", file.name)
    return int(named[1]) if named else -1


def _configs(logs: Path) -> list[Path]:
    return [*logs.glob(f"*/{CONFIG}"), *logs.glob(f"*/*/{CONFIG}")]


def _name(folder: Path, logs: Path) -> str:
    return folder.relative_to(logs).as_posix()
