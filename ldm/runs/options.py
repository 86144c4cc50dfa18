"""A command line -> the config of its run."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ldm.config import load_config, param_of
from ldm.errors import UserError
from ldm.runs.command import ALIASES, Command, read_command
from ldm.schema import RunConfig
from ldm.targets import allow

log = logging.getLogger(__name__)


def config_of(command: Command) -> RunConfig:
    """The merged and checked config. Raises UserError for a wrong file or key, type or number."""
    allow(*command.allow)
    config = merge(command.paths, command.dotlist, literals=command.literals)
    _warn_of_class_word(command, config)
    return config


def _warn_of_class_word(command: Command, config: RunConfig) -> None:
    """Says that photos in place of the config's own are given its class."""
    root, class_word = ALIASES["data_root"], ALIASES["class_word"]
    dotlist = {word.partition("=")[0].strip(): word for word in command.dotlist}
    named = command.literals.keys() | dotlist.keys()
    if root not in named or class_word in named or command.resume:
        return
    literals = {key: value for key, value in command.literals.items() if key != root}
    try:
        of_files = load_config(command.paths, [dotlist[k] for k in dotlist if k != root], literals=literals)
    except UserError:  # it has no photos of its own, but `???`
        return
    own, photos = (OmegaConf.select(c, root) for c in (of_files, config.source))
    if own and own != photos and (word := param_of(config.data, "class_word")):
        log.warning("%s: taken for a %s, as in the config; --class_word WORD says what it is", photos, word)


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
