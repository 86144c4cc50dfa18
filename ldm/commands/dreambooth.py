"""The whole job from one config: prior images, training, samples, metrics, model file.

    main.py --base configs/dreambooth.yaml [more.yaml ...] [key.sub=value ...]

Files are merged from left to right, then the overrides.
"""

import logging
import os
import sys
from collections.abc import Sequence

from ldm.commands.entry import run
from ldm.runs.command import Command, read_command


def main(words: Sequence[str]) -> int:
    """Runs a command line -> the exit status."""
    return run(lambda: work(read_command(words, description=__doc__)), level=logging.INFO)


def work(command: Command) -> None:
    """Prints what the run has measured and left, or the plan of a dry run."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(f"{' + '.join(command.paths)}: PyTorch is being loaded", file=sys.stderr, flush=True)
    # Not before: --help and a wrong option need not wait for torch and Lightning
    from ldm.engine import distributed, signals
    from ldm.runs import console, job
    from ldm.runs.options import config_of

    signals.stop_at_once()
    console.speak()
    config = config_of(command)
    if command.dry_run:
        print(job.plan(config))
        return
    distributed.launch(config.trainer)
    left = job.run_job(config, command.resume, allow_config_change=command.allow_config_change)
    if left:
        print(console.closing(left, config))
    distributed.leave()


def command() -> int:
    return main(sys.argv[1:])
