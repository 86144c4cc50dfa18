"""A look at photos before training: what `check_photos.py` does."""

from argparse import Namespace
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from ldm.data.buckets import Buckets, shapes_of
from ldm.data.buckets_in_use import BucketsInUse
from ldm.data.images import ImageFiles, list_images, to_image
from ldm.data.items import SourceImage, TrainingView
from ldm.data.photo_check import LEAST_SHARP, PhotoFacts, Trouble, photo_facts, troubles
from ldm.data.streams import StreamPart
from ldm.errors import UserError
from ldm.files import atomic_write, file_sha256, make_folder
from ldm.reports.photos_page import PhotoCard, photos_page

SHOWN_VIEWS = 8  # of a photo


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


def cards_of(
    photos: Sequence[PhotoFacts], found: Sequence[Trouble], shown: Sequence[TrainingView]
) -> list[PhotoCard]:
    """The photos with their views, of which the page reads one after the other."""
    views: dict[Path, list] = {}
    for view in shown:
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


def check_photos(options: Namespace) -> Path:
    """Prints what to look at -> the page of the photos and their views."""
    if min(options.size, options.crop_variants, options.bucket_unit) < 1:
        remedy = "Give --size, --crop_variants and --bucket_unit from 1."
        raise UserError("There is nothing to show", remedy=remedy)
    paths = list_images(options.photos, skip_unreadable=options.skip_unreadable)
    images = [SourceImage(path, file_sha256(path), "") for path in paths]
    buckets = Buckets(unit=options.bucket_unit) if options.buckets else None
    part = StreamPart("photos", Fraction(1), images)
    candidates = shapes_of(buckets, options.size, unit=options.bucket_unit)
    in_use = BucketsInUse(lambda: [part], candidates, seed=options.seed)
    shapes = {image.path: in_use.shape_of(image) for image in images}
    photos = photo_facts(paths, mask_root=options.mask_root, shape_of=shapes.__getitem__)
    found = troubles(photos, shapes=shapes)
    stream = in_use.photo_stream(
        "subject",
        [part],
        empty_share=0.0,
        seed=options.seed,
        crop_variants=options.crop_variants if options.crop == "random" else None,
        flip=False,
        caption_dropout=0.0,
    )
    title = f"{len(photos)} photos in {options.photos.resolve().name}"
    sides = f"{options.size} pixels a side"
    if buckets is not None:
        sides = f"in these shapes, height x width: {', '.join(map(str, in_use.shapes))} pixels"
    page = photos_page(
        title, cards=cards_of(photos, found, stream.views()), troubles=list(map(str, found)), sides=sides
    )
    out = options.out or Path("logs", f"photos-{options.photos.resolve().name}.html")
    make_folder(out.parent)
    with atomic_write(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(title, *(found or ["Nothing stands out."]), sep="\n")
    return out
