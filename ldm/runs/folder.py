"""Run folders: creation, locking, and finding unfinished runs."""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any

from ldm.config import load_config, to_container
from ldm.engine.locks import try_lock
from ldm.engine.resume import check_changes
from ldm.errors import UserError
from ldm.files import remove_leftovers, writing
from ldm.runs.find_run import find_run

log = logging.getLogger(__name__)

LOGS = Path("logs")
LONGEST_NAME = 250  # bytes that file systems take (255), less the number of a run of the same name
MARKER = ".unfinished"  # exists until the run is finished; locked by the process that works on it


def folder_to_resume(
    container: Mapping[str, Any], resume: str | None, *, allow_config_change: bool, logs: Path = LOGS
) -> Path | None:
    """The folder of the run to `resume`, whose config must be this one; None for a new run.

    "auto" resumes the newest unfinished run of the config's name that no process works on, if there is one.
    """
    if not resume:
        return None
    if resume == "auto":
        check_name(container["name"])
        found = find_unfinished(container["name"], logs=logs)
    else:
        found = find_run(resume, logs=logs)
    if found and (kept := _config_in(found)) is not None:
        check_changes(kept, container, allowed=allow_config_change, run=found)
    return found


def _config_in(folder: Path) -> dict[str, Any] | None:
    kept = folder / "config.yaml"
    return to_container(load_config([kept])) if kept.exists() else None


def check_name(name: str) -> None:
    """Raises UserError for a `name` that is not a folder inside of `logs`: a name, or names with slashes."""
    parts = name.split("/")
    if any(part.strip() in ("", ".", "..") or len(part.encode()) > LONGEST_NAME for part in parts):
        remedy = "Give a name such as rex, or studies/rex."
        raise UserError(f"{name!r} does not name a folder inside logs", where="name", remedy=remedy)
    if "\0" in name or PureWindowsPath(name).anchor and os.name == "nt":
        raise UserError(f"{name!r} is no name of a folder", where="name", remedy="Give another one.")


def new_folder(wanted: Path, *, remedy: str = "Choose another `name`.") -> Path:
    """Creates `wanted`, or the first of `wanted-2`, `wanted-3`, ... that does not exist.

    Raises UserError, with the remedy, where it cannot be created.
    """
    for number in range(1, 10_000):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            what = f"The folder cannot be created: {error.strerror or error}"
            raise UserError(what, where=folder, remedy=remedy) from error
        return folder
    raise UserError("There are too many folders of this name", where=wanted, remedy=remedy)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Locks a run's folder; leaving the block without an exception marks the run as finished."""
    with writing(folder / MARKER):
        marker = (folder / MARKER).open("a")
    with marker as file:
        if not try_lock(file):
            what = "Another process is working on this run"
            raise UserError(what, where=folder, remedy="Wait for it, stop it, or start another run.")
        os.utime(folder / MARKER)
        remove_leftovers(folder)
        yield
        (folder / MARKER).unlink()


def find_unfinished(name: str, *, logs: Path = LOGS) -> Path | None:
    """The most recent unfinished run of a name that no process works on, in the folder NAME or NAME-N."""
    wanted = logs / name
    own = re.compile(re.escape(wanted.name) + r"(-\d+)?")
    markers = [path for path in wanted.parent.glob(f"*/{MARKER}") if own.fullmatch(path.parent.name)]
    for marker in sorted(markers, key=lambda path: path.stat().st_mtime, reverse=True):
        is_numbered = marker.parent != wanted
        if is_numbered and (_config_in(marker.parent) or {}).get("name", name) != name:
            continue  # another run, whose own name ends in a number
        with marker.open("a") as file:
            if try_lock(file):
                return marker.parent
        log.info("%s: another process is working on it", marker.parent)
    return None
