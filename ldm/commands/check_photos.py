"""Look at photos before training: check_photos.py PHOTOS.

Says which are small, blurred, nearly the same, or without a caption, and where a mask or alpha shows the
subject, whether it is cut or far from the middle. Writes a page of each photo and the views that are trained
on.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ldm.commands.entry import parser_of, run


def parse(words: Sequence[str] | None = None) -> Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("photos", type=Path, help="folder of photos of the subject, or of its class")
    add("--size", type=int, default=512, help="pixels a side, as in training (512)")
    add("--crop", choices=("center", "random"), default="center", help="as in training (center)")
    add("--crop_variants", type=int, default=8, help="random crops of each photo (8)")
    add("--buckets", action="store_true", help="photos keep their shape, as with data.params.buckets={}")
    add("--bucket_unit", type=int, default=64, help="pixels of which sides are multiples (64)")
    add("--seed", type=int, default=23, help="of the random crops, that of the run (23)")
    add("--mask_root", type=Path, help="folder of the photos' masks (beside them: NAME.mask.png)")
    add("--skip_unreadable", action="store_true", help="skip images that cannot be decoded")
    add("--out", type=Path, help="the page (logs/photos-NAME.html)")
    return parser.parse_args(words)


def main(options: Namespace) -> Path:
    """Says what to look at -> the page."""
    from ldm.runs.check_photos import check_photos

    return check_photos(options)


def command() -> int:
    return run(lambda: print(main(parse())))
