"""A command line -> the config of its run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.config import load_config
from ldm.runs.command import Command, read_command
from ldm.schema import RunConfig
from ldm.targets import allow


def config_of(command: Command) -> RunConfig:
    """The merged and checked config. Raises UserError for a wrong file or key, type or number."""
    allow(*command.allow)
    return merge(command.paths, command.dotlist, literals=command.literals)


def merge(
    paths: Sequence[str | Path], dotlist: Sequence[str] = (), *, literals: Mapping[str, Any]
) -> RunConfig:
    """Config files, then values as they are, then overrides -> the checked config (see `load_config`)."""
    config = load_config(paths, dotlist, literals=literals)
    given = [*(f"{key}={value}" for key, value in literals.items()), *dotlist]
    return RunConfig.parse(config, paths=paths, dotlist=given)


def parse(argv: Sequence[str]) -> RunConfig:
    """Words of a command line -> the merged and checked config."""
    return config_of(read_command(argv, description=None))
