"""Images inside an HTML page: small enough that all of them together keep within a number of bytes."""

import base64
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from PIL import Image, ImageOps

PIXEL_ART = 128  # pixels a side up to which an image is shown without smoothing
QUALITY = 86  # of JPEG
LEAST = 8  # pixels a side: no thumbnail becomes smaller


class Group(NamedTuple):
    """Images of one kind, at most width x height pixels in the page; they are read one after the other."""

    images: Iterable[Image.Image]
    alts: Sequence[str]  # the text alternative of each
    width: int
    height: int


class Picture(NamedTuple):
    """What an <img> needs."""

    src: str  # data:image/...
    width: int
    height: int
    alt: str
    kind: str  # "pixels" are shown without smoothing


def embed(groups: Mapping[Any, Group], *, most_bytes: int) -> dict[Any, list[Picture]]:
    """The groups' images as data; all are made smaller until together they take no more than `most_bytes`."""
    scale = 1.0
    while True:
        shown = {key: list(_pictures(group, scale)) for key, group in groups.items()}
        taken = sum(len(picture.src) for pictures in shown.values() for picture in pictures)
        smallest = min((side for group in groups.values() for side in group[2:]), default=0) * scale
        if taken <= most_bytes or smallest <= LEAST:
            return shown
        scale *= 0.9 * math.sqrt(most_bytes / taken)


def _pictures(group: Group, scale: float) -> Iterator[Picture]:
    width, height = (max(LEAST, round(side * scale)) for side in (group.width, group.height))
    picture = partial(_picture, width=width, height=height, scale=scale)
    return map(picture, group.images, group.alts)  # a loop would hold an image while it reads the next


def _picture(image: Image.Image, alt: str, *, width: int, height: int, scale: float) -> Picture:
    """PNG for an image that is small by itself, otherwise JPEG."""
    small = max(image.size) <= PIXEL_ART and scale == 1
    if image.width > width or image.height > height:
        image = ImageOps.contain(image, (width, height), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    how = {"format": "PNG"} if small else {"format": "JPEG", "quality": QUALITY, "optimize": True}
    image.convert("RGB").save(data, **how)
    text = base64.b64encode(data.getvalue()).decode("ascii")
    kind = "png" if small else "jpeg"
    return Picture(
        f"data:image/{kind};base64,{text}", image.width, image.height, alt, "pixels" if small else "photo"
    )
