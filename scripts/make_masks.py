"""Make masks of photos, for a masked loss: python scripts/make_masks.py FOLDER.

Writes NAME.mask.png beside each photo without a mask, overwrites none, and makes a contact sheet to check
them by: photo, mask, what is left. Needs the extra `masks` (rembg), which loads the network.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed
from ldm.data.make_masks import make_masks, rembg_segment, sheet
from ldm.errors import UserError
from ldm.files import atomic_write


def parse(words: Sequence[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("folder", type=Path, help="photos of the subject")
    add("--model", default="u2net", help="a network of rembg's; mind its license (u2net)")
    add("--sheet", type=Path, metavar="PNG", help="the contact sheet (FOLDER-masks.png)")
    return parser.parse_args(words)


def main(options: argparse.Namespace) -> Path:
    """Makes the masks that are missing -> the contact sheet."""
    masks = make_masks(options.folder, rembg_segment(options.model))
    folder = options.folder.resolve()
    path = options.sheet or folder.with_name(f"{folder.name}-masks.png")
    with atomic_write(path) as temporary:
        sheet(masks).save(temporary, format="PNG")
    return path


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    try:
        print(main(parse(sys.argv[1:])))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
