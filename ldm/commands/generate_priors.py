"""Generate the prior images of a config, and nothing else: the same set that main.py would use.

    generate_priors.py --base configs/dreambooth.yaml [key.sub=value ...]

Under torchrun, or with `trainer.devices=N`, the images are divided among the processes.
"""

import logging
from collections.abc import Sequence

from ldm.commands.entry import run
from ldm.runs.command import read_command


def main(words: Sequence[str] | None = None) -> None:
    """Generates the missing images; prints their folders."""
    given = read_command(words, description=__doc__, trains=False)
    from ldm.engine import distributed, signals
    from ldm.runs import console
    from ldm.runs.generate_set import generate_set
    from ldm.runs.options import config_of

    signals.stop_at_once()
    console.speak()
    config = config_of(given)
    distributed.launch(config.trainer)
    folders = generate_set(config)
    if distributed.rank() == 0:
        print(*folders, sep="\n")
    distributed.leave()


def command() -> int:
    return run(main, level=logging.INFO)
