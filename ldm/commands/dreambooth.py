"""The whole job from one config: prior images, training, samples, metrics, model file.

    main.py --base configs/dreambooth.yaml [more.yaml ...] [key.sub=value ...]

Files are merged from left to right, then the overrides.
"""

import logging
import sys
from collections.abc import Sequence

from ldm.commands.entry import run
from ldm.runs.command import Command, read_command


def main(words: Sequence[str]) -> int:
    """Runs a command line -> the exit status."""
    return run(lambda: work(read_command(words, description=__doc__)), level=logging.INFO)


def work(command: Command) -> None:
    """Prints the paths of what the run leaves, or the plan of a dry run."""
    # Not before: --help and a wrong option need not wait for torch and Lightning
    from ldm.engine import distributed, signals
    from ldm.runs import job
    from ldm.runs.options import config_of

    signals.stop_at_once()
    config = config_of(command)
    if command.dry_run:
        print(job.plan(config))
        return
    distributed.launch(config.trainer)
    left = job.run_job(config, command.resume, allow_config_change=command.allow_config_change)
    print(*left, sep="\n")
    distributed.leave()


def command() -> int:
    return main(sys.argv[1:])
