"""The model that a path names: a file, a run, an id on the hub, or by default the newest run."""

from pathlib import Path

from ldm.checkpoints.hub import local_path
from ldm.errors import UserError


def find_model(path: Path | None = None) -> Path:
    """The model file of a run folder, a file as it is, or by default the newest run's under logs/.

    What a hub id names is downloaded, unless it is here.
    """
    path = None if path is None else local_path(path)
    if path is not None and (path / "model.safetensors").exists():
        return path / "model.safetensors"
    if path is not None and (path / "config.yaml").exists() and not (path / "model_index.json").exists():
        remedy = "Continue it with main.py --resume, or name one of its checkpoints."
        raise UserError("The run has no model yet", where=path, remedy=remedy)
    if path is not None:
        return path
    found = [*Path("logs").glob("*/model.safetensors"), *Path("logs").glob("*/*/model.safetensors")]
    of_runs = [file for file in found if (file.parent / "config.yaml").exists()]
    alone = [file for file in of_runs if not file.parent.match("*-*/*--*--*")]  # not of a study's many runs
    runs = sorted(alone, key=lambda file: file.stat().st_mtime)
    if not runs:
        raise UserError("There is no finished run under logs/", remedy="Name a file or a run with --model.")
    return runs[-1]
