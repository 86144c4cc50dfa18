"""The command line of `main.py` -> a merged and checked config."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
from omegaconf import DictConfig

from ldm import config as configs
from ldm.errors import UserError
from ldm.training.device import MatmulPrecision
from ldm.training.run import Export
from ldm.training.sampling import PriorDrawing, SampleDrawing

ALIASES = {  # flag -> config key
    "name": "name",
    "seed": "seed",
    "actual_resume": "base_checkpoint",
    "data_root": "data.params.subject_root",
    "reg_data_root": "data.params.prior_root",
    "class_word": "data.params.class_word",
}


SECTIONS = {
    "name": str,
    "seed": int,
    "base_checkpoint": str | None,
    "base_parts": dict[str, str] | None,
    "ema_decay": float | None,
    "ema_device": str | None,
    "matmul_precision": MatmulPrecision,
    "checkpoint_every": int,
    "checkpoints_kept": int,
    "model": dict,
    "data": dict,
    "priors": PriorDrawing,
    "trainer": pl.Trainer,
    "logger": dict | None,
    "samples": SampleDrawing,
    "evaluation": dict | None,
    "export": Export,
}
REQUIRED = ("name", "seed", "model", "data", "trainer")


def parse(argv: Sequence[str], *, description: str) -> tuple[DictConfig, argparse.Namespace]:
    """The command line -> the merged and checked config, and the options that are no config."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("-b", "--base", nargs="+", default=[], metavar="YAML", help="configs to merge")
    parser.add_argument(
        "-r",
        "--resume",
        metavar="RUN",
        help="continue the run in this folder; auto: the newest unfinished one of this name, else a new one",
    )
    parser.add_argument("--allow_config_change", action="store_true", help="continue it with another config")
    parser.add_argument("--dry_run", action="store_true", help="print config, memory and disk needed; stop")
    for flag, key in ALIASES.items():
        short = [f"-{flag[0]}"] if flag in ("name", "seed") else []
        parser.add_argument(*short, f"--{flag}", metavar="VALUE", help=f"the same as {key}=VALUE")
    options, rest = parser.parse_known_args(argv)
    words = options.base + rest
    unknown = [word for word in rest if "=" not in word or word.startswith("-")]
    if unknown:
        raise UserError(f"`{unknown[0]}` is not an option", remedy="Write overrides as `key.sub=value`.")
    paths = [word for word in words if "=" not in word]
    if options.resume not in (None, "auto"):
        paths = [Path(options.resume) / "config.yaml", *paths]
    if not paths:
        raise UserError("No config is given", remedy="Try `--base configs/dreambooth.yaml`.")
    given = {key: getattr(options, flag) for flag, key in ALIASES.items()}
    dotlist = [f"{key}={value}" for key, value in given.items() if value is not None]
    dotlist += [word for word in words if "=" in word]
    config = configs.load_config(paths, dotlist)
    configs.check(config, SECTIONS, required=REQUIRED, paths=paths, dotlist=dotlist)
    return config, options
