"""The command line of `main.py`, without slow imports: --help and a wrong option are answered at once."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ldm.errors import UserError
from ldm.runs.find_run import find_run
from ldm.runs.old_flags import remedy_for

ALIASES = {  # flag -> config key
    "name": "name",
    "seed": "seed",
    "actual_resume": "base_checkpoint",
    "data_root": "data.params.subject_root",
    "reg_data_root": "data.params.prior_root",
    "class_word": "data.params.class_word",
}
MEANINGS = {  # flag -> its value in the help, what it is
    "name": ("NAME", "the run is kept in logs/NAME"),
    "seed": ("N", "all random numbers follow from it"),
    "actual_resume": ("MODEL", "the base: a file, a diffusers folder or a hub id"),
    "data_root": ("FOLDER", "photos of the subject"),
    "reg_data_root": ("FOLDER", "your own images of the class, in place of generated ones"),
    "class_word": ("WORD", "what the subject is, such as dog"),
}


@dataclass(frozen=True)
class Command:
    """A parsed command line: `paths`, `literals` and `dotlist` are merged to the config in this order.

    literals: key -> the value of its flag, which is never read as YAML.
    """

    paths: Sequence[str]
    literals: Mapping[str, str | int]
    dotlist: Sequence[str]
    resume: str | None
    allow_config_change: bool
    dry_run: bool
    allow: Sequence[str]  # packages whose classes nodes may name


def read_command(argv: Sequence[str], *, description: str | None, trains: bool = True) -> Command:
    """Parses a command line. Raises UserError for an unknown option, or without a config.

    trains: whether the command trains, so that there are runs to continue and a training to forecast.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("-b", "--base", nargs="+", default=[], metavar="YAML", help="configs to merge")
    parser.add_argument(
        "--allow", action="append", default=[], metavar="PACKAGE", help="let configs name classes of your own"
    )
    parser.set_defaults(resume=None, allow_config_change=False, dry_run=False)
    if trains:
        _add_training(parser)
    for flag, key in ALIASES.items():
        short = [f"-{flag[0]}"] if flag in ("name", "seed") else []
        value, meaning = MEANINGS[flag]
        parser.add_argument(*short, f"--{flag}", metavar=value, help=f"{meaning} ({key})")
    options, rest = parser.parse_known_args(argv)
    return _command(options, rest)


def _add_training(parser: argparse.ArgumentParser) -> None:
    """Options of a command that trains."""
    parser.add_argument(
        "-r",
        "--resume",
        metavar="RUN",
        help="continue this run (name or folder); auto: the newest unfinished of this name, else a new one",
    )
    parser.add_argument("--allow_config_change", action="store_true", help="continue it with another config")
    parser.add_argument("--dry_run", action="store_true", help="print config, memory and disk needed; stop")


def _command(options: argparse.Namespace, rest: Sequence[str]) -> Command:
    """The command of parsed options, and of the words that are none."""
    unknown = [word for word in rest if "=" not in word or word.startswith("-")]
    if unknown:
        remedy = remedy_for(unknown[0]) or "Write overrides as `key.sub=value`."
        raise UserError(f"`{unknown[0]}` is not an option", remedy=remedy)
    words = options.base + rest
    paths = [word for word in words if "=" not in word]
    if options.resume not in (None, "auto"):
        options.resume = str(find_run(options.resume))
        paths = [f"{options.resume}/config.yaml", *paths]
    if not paths:
        raise UserError("No config is given", remedy="Try `--base configs/dreambooth.yaml`.")
    given = {flag: getattr(options, flag) for flag in ALIASES}
    literals = {ALIASES[flag]: _literal(flag, value) for flag, value in given.items() if value is not None}
    dotlist = [word for word in words if "=" in word]
    return Command(
        paths,
        literals,
        dotlist,
        resume=options.resume,
        allow_config_change=options.allow_config_change,
        dry_run=options.dry_run,
        allow=options.allow,
    )


def _literal(flag: str, value: str) -> str | int:
    """The value of a flag: a number of --seed, else just this text."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{value!r} is no UTF-8", where=f"--{flag}", remedy="Rename it.") from error
    if flag != "seed":
        return value
    try:
        return int(value)
    except ValueError as error:
        raise UserError(f"`{value}` is no whole number", where="--seed") from error
