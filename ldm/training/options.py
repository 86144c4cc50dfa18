"""The sections of a job's config, and its check."""

from collections.abc import Sequence
from typing import Literal

import pytorch_lightning as pl
from omegaconf import DictConfig

from ldm import config as configs
from ldm.training.command import Command, read_command
from ldm.training.device import MatmulPrecision
from ldm.training.online_eval import OnlineEvalConfig
from ldm.training.run import Export
from ldm.training.sampling import PriorsConfig, SamplesConfig

SECTIONS = {
    "name": str,
    "seed": int,
    "base_checkpoint": str | None,
    "base_parts": dict[str, str] | None,
    "ema_decay": float | None,
    "ema_device": Literal["cpu"] | None,
    "ema_every": int,
    "matmul_precision": MatmulPrecision,
    "checkpoint_every": int,
    "checkpoints_kept": int,
    "model": dict,
    "data": dict,
    "priors": PriorsConfig,
    "trainer": pl.Trainer,
    "logger": dict | None,
    "samples": SamplesConfig,
    "evaluation": dict | None,
    "evaluate_also": dict | None,  # name -> params of `evaluation` that differ: the same metrics once more
    "online_eval": OnlineEvalConfig,
    "export": Export,
}
REQUIRED = ("name", "seed", "model", "data", "trainer")


def config_of(command: Command) -> DictConfig:
    """The merged and checked config. Raises UserError for a wrong file or key."""
    config = configs.load_config(command.paths, command.dotlist)
    configs.check(config, SECTIONS, required=REQUIRED, paths=command.paths, dotlist=command.dotlist)
    return config


def parse(argv: Sequence[str], *, description: str | None = None) -> DictConfig:
    """Words of a command line -> the merged and checked config."""
    return config_of(read_command(argv, description=description))
