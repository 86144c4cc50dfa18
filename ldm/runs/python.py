"""The public Python interface: a config, its run, and what that leaves (docs/python.md)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.runs.job import run_job
from ldm.runs.options import merge
from ldm.schema import RunConfig


@dataclass(frozen=True)
class Run:
    """A finished run of DreamBooth: its folder, and what lies in it."""

    folder: Path

    @property
    def model(self) -> Path:
        """model.safetensors, for `Text2Image.from_file` and other tools."""
        return self.folder / "model.safetensors"

    @property
    def report(self) -> Path:
        """report.html, the run on one page."""
        return self.folder / "report.html"

    @property
    def metrics(self) -> dict[str, Any]:
        """What metrics.json holds: each metric, with the base's and the photos'; seconds and memory."""
        return json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))


def load_config(*paths: str | Path, overrides: Mapping[str, object] | None = None) -> RunConfig:
    """Config files, merged from left to right, then dotted keys with their values -> the checked config.

        load_config("configs/dreambooth.yaml", overrides={"trainer.max_steps": 200})

    A file that is not in the current folder is looked for among those that ship. Raises UserError for a wrong
    file, key, type or number, with the nearest valid name.
    """
    if not paths:
        raise UserError("No config is given", remedy="Try `configs/dreambooth.yaml`.")
    values = {key: str(v) if isinstance(v, Path) else v for key, v in (overrides or {}).items()}
    return merge(paths, literals=values)


def train(config: RunConfig, *, resume: str | Path | None = None, allow_config_change: bool = False) -> Run:
    """Runs a config of DreamBooth in this process, on one device -> what it leaves.

    resume: a run to continue, or "auto": the newest unfinished one of the config's name, if there is one.
    Raises UserError, before any work, for what cannot end well.
    """
    if not config.is_dreambooth:
        raise UserError("This config trains no subject", where="data.target", remedy="Run it by main.py.")
    given = None if resume is None else str(resume)
    left = run_job(config, given, allow_config_change=allow_config_change)
    return Run(left[-1].parent)
