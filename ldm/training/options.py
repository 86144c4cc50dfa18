"""A command line -> the config of its run."""

from collections.abc import Sequence

from ldm.config import load_config
from ldm.targets import allow
from ldm.training.command import Command, read_command
from ldm.training.schema import RunConfig


def config_of(command: Command) -> RunConfig:
    """The merged and checked config. Raises UserError for a wrong file or key, type or number."""
    for package in command.allow:
        allow(package)
    config = load_config(command.paths, command.dotlist, literals=command.literals)
    given = [*(f"{key}={value}" for key, value in command.literals.items()), *command.dotlist]
    return RunConfig.parse(config, paths=command.paths, dotlist=given)


def parse(argv: Sequence[str], *, description: str | None = None) -> RunConfig:
    """Words of a command line -> the merged and checked config."""
    return config_of(read_command(argv, description=description))
