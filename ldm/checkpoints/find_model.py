"""The model that a path names: a file, a run, an id on the hub, or by default the newest run."""

import os
from pathlib import Path

from ldm.checkpoints.hub import local_path
from ldm.checkpoints.tensors import no_such_file
from ldm.errors import UserError


def find_model(path: Path | None = None) -> Path:
    """The model file of a run folder, a file as it is, or by default the newest run's under logs/.

    What a hub id names is downloaded, unless it is here.
    """
    if path is None:
        return _newest()
    path = local_path(path)
    if not os.path.exists(path):  # `Path.exists` raises for names that are too long
        raise _by_name_alone(path) if _is_run(path) else no_such_file(path)
    if (path / "model.safetensors").exists():
        return path / "model.safetensors"
    if path.is_dir() and not (path / "model_index.json").exists():
        if (path / "config.yaml").exists():
            remedy = "Continue it with main.py --resume, or name one of its checkpoints."
            raise UserError("The run has no model yet", where=path, remedy=remedy)
        if _is_run(path):
            raise _by_name_alone(path)
    return path


def _newest() -> Path:
    """The model of the newest run; converted ones and those of studies, which are many, are none."""
    found = [*Path("logs").glob("*/model.safetensors"), *Path("logs").glob("*/*/model.safetensors")]
    of_runs = [file for file in found if (file.parent / "config.yaml").exists()]
    alone = [file for file in of_runs if not file.parent.match("*-*/*--*--*")]
    runs = sorted(alone, key=lambda file: file.stat().st_mtime)
    if not runs:
        raise UserError("There is no finished run under logs/", remedy="Name a file or a run with --model.")
    return runs[-1]


def _is_run(name: Path) -> bool:
    return os.path.exists(Path("logs", name, "config.yaml"))


def _by_name_alone(name: Path) -> UserError:
    return UserError(
        "This is no model, but a run's name", where=name, remedy=f"Name its folder, logs/{name}."
    )
