"""Look at photos before training: python scripts/check_photos.py PHOTOS.

Says which are small, blurred, nearly the same, or without a caption, and where alpha shows the subject,
whether it is cut or far from the middle. Writes a page of each photo and the views that are trained on.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed
from ldm.data.images import ImageFiles, list_images, to_image
from ldm.data.items import SourceImage, Stream
from ldm.data.photo_check import LEAST_SHARP, PhotoFacts, Trouble, troubles
from ldm.errors import UserError
from ldm.files import atomic_write, file_sha256, make_folder
from ldm.reports.photos_page import PhotoCard, photos_page

SHOWN_VIEWS = 8  # of a photo


def parse(words: Sequence[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("photos", type=Path, help="folder of photos of the subject, or of its class")
    add("--size", type=int, default=512, help="pixels a side, as in training (512)")
    add("--crop", choices=("center", "random"), default="center", help="as in training (center)")
    add("--crop_variants", type=int, default=8, help="random crops of each photo (8)")
    add("--seed", type=int, default=23, help="of the random crops, that of the run (23)")
    add("--skip_unreadable", action="store_true", help="skip images that cannot be decoded")
    add("--out", type=Path, help="the page (logs/photos-NAME.html)")
    return parser.parse_args(words)


def facts_of(photo: PhotoFacts) -> dict[str, str]:
    """What the page says of a photo."""
    facts = {
        "Size": f"{photo.width} x {photo.height}",
        "Sharpness": f"{photo.sharpness:.0f}; blurred below {LEAST_SHARP:.0f}",
        "Colours": photo.profile or "no profile: read as sRGB",
        "Caption": photo.caption or "none",
    }
    if photo.turned:
        facts["Turned"] = "the camera was; it is shown upright, by EXIF"
    if photo.subject is not None:
        left, top, right, bottom = photo.subject.box
        facts["Subject"] = f"{right - left} x {bottom - top}, at {left}, {top}"
    return facts


def cards_of(photos: Sequence[PhotoFacts], found: Sequence[Trouble], stream: Stream) -> list[PhotoCard]:
    """The photos with their views, of which the page reads one after the other."""
    views: dict[Path, list] = {}
    for view in stream.views():
        views.setdefault(view.source.path, []).append(view)
    return [
        PhotoCard(
            photo.path.name,
            ImageFiles([photo.path]),
            facts_of(photo),
            [str(trouble) for trouble in found if photo.path.name in trouble.photos],
            [to_image(view.render()) for view in views[photo.path][:SHOWN_VIEWS]],
        )
        for photo in photos
    ]


def main(options: argparse.Namespace) -> Path:
    if options.size < 1 or options.crop_variants < 1:
        raise UserError("There is nothing to show", remedy="Give --size and --crop_variants from 1.")
    paths = list_images(options.photos, skip_unreadable=options.skip_unreadable)
    photos = [PhotoFacts.of(path) for path in paths]
    found = troubles(photos, size=options.size)
    stream = Stream(
        "subject",
        tuple(SourceImage(path, file_sha256(path), "") for path in paths),
        size=options.size,
        seed=options.seed,
        crop_variants=options.crop_variants if options.crop == "random" else None,
        flip=False,
        caption_dropout=0.0,
    )
    title = f"{len(photos)} photos in {options.photos.resolve().name}"
    page = photos_page(
        title, cards=cards_of(photos, found, stream), troubles=list(map(str, found)), size=options.size
    )
    out = options.out or Path("logs", f"photos-{options.photos.resolve().name}.html")
    make_folder(out.parent)
    with atomic_write(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(title, *found, sep="\n")
    return out


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        print(main(parse(sys.argv[1:])))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
