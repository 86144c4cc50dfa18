"""Make masks of photos, for a masked loss: make_masks.py FOLDER.

Writes NAME.mask.png beside each photo without a mask, overwrites none, and makes a contact sheet to check
them by: photo, mask, what is left. Needs the extra `masks` (rembg), which loads the network.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ldm.commands.entry import parser_of, run


def parse(words: Sequence[str] | None = None) -> Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("folder", type=Path, help="photos of the subject")
    add("--model", default="u2net", help="a network of rembg's; mind its licence (u2net)")
    add("--sheet", type=Path, metavar="PNG", help="the contact sheet (FOLDER-masks.png)")
    return parser.parse_args(words)


def main(options: Namespace) -> Path:
    """Makes the masks that are missing -> the contact sheet."""
    from ldm.runs.mask_photos import mask_photos

    return mask_photos(options)


def command() -> int:
    return run(lambda: print(main(parse())))
