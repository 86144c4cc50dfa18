"""What the commands share: errors as one sentence, choices that are looked up only when one is made.

Modules of commands import nothing slow, so that --help and a wrong option are answered at once.
"""

import importlib
import logging
import sys
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable

from ldm.errors import UserError


def parser_of(description: str | None) -> ArgumentParser:
    """A parser whose help keeps the lines of the description; options are written in full."""
    return ArgumentParser(
        description=description, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
    )


def run(work: Callable[[], object], *, level: int = logging.WARNING) -> int:
    """Does the work of a command -> its exit status: 2 for an error, as a sentence, 130 for Ctrl+C."""
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s")
    try:
        work()
    except (UserError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # where a run does not end by itself, as while PyTorch is being loaded
        return 130
    return 0


def one_of(place: str) -> Callable[[str], str]:
    """An option's type: a name in the collection `module:NAME`, imported when the option is given."""

    def check(word: str) -> str:
        module, _, name = place.partition(":")
        known = getattr(importlib.import_module(module), name)
        if word not in known:
            raise ArgumentTypeError(f"`{word}` is none of {', '.join(known)}")
        return word

    return check
