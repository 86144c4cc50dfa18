"""Upload a run's model to the Hugging Face hub, with its model card: publish.py logs/rex --to user/name.

Without --yes it only says what it would upload: README.md (the card), the weights and the contact sheet of
samples, never photos, checkpoints or paths. Read the card before: whose photos are they, and what does the
licence of the base ask?
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ldm.commands.entry import parser_of, run


def parse(words: Sequence[str] | None = None) -> Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("run", type=Path, nargs="?", help="folder of a run; default: the newest under logs/")
    add("--to", required=True, metavar="USER/NAME", help="repository on the hub, made where there is none")
    add("--lora_only", action="store_true", help="LoRA and learned token alone, without the merged model")
    add("--public", action="store_true", help="a new repository is public (private)")
    add("--yes", action="store_true", help="upload")
    return parser.parse_args(words)


def main(options: Namespace) -> None:
    """Uploads, or says what it would upload."""
    from ldm.runs.publish import publish

    publish(options)


def command() -> int:
    return run(lambda: main(parse()))
