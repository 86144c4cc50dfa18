"""A check-up of a subject's photos before they are trained on: what a person would wish to know of each.

Nothing is refused here: a photo that cannot be read is refused where it is listed, see `ldm.data.images`.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

from ldm.data.buckets import Shape
from ldm.data.captions import FolderCaptions
from ldm.data.images import ORIENTATION, alpha_channel, crop_to, is_enlarged, load_image, open_image
from ldm.data.masks import masks_by_name, masks_of, read_mask
from ldm.errors import UserError

SHARPNESS_SIDE = 512  # pixels of the shorter side at which sharpness is measured; nothing is enlarged
# Of the 27 photos of five subjects of Ruiz et al. 2023 the softest has 100; after a Gaussian blur of 1.5
# pixels at this scale the sharpest has 17.
LEAST_SHARP = 30.0
HASH_SIDE = 16
# Of 256 bits. Different photos of one of those subjects, or of a drawn one, differ in 67 or more; a photo and
# the same one scaled, 15 % brighter or with 2 % cut off each side in up to 43.
TWINS = 48
OFF_CENTER = 0.25  # of a side, between the middle of the subject and that of the photo
CUT = 0.02  # share of the subject's area outside the crop that is worth a word
OPAQUE = 128 / 255  # alpha, or value of a mask, from which a pixel is of the subject
EMPTY: Mapping[Path, Shape] = MappingProxyType({})
SQUARE = Shape.square(1)  # the crop without buckets, whatever its size


class Trouble(NamedTuple):
    """What is wrong with some photos, in words that go on with their names."""

    what: str
    photos: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.what}: {', '.join(self.photos)}" if self.photos else self.what


class Subject(NamedTuple):
    """Where a photo's mask or alpha shows the subject."""

    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels
    cut_by_crop: float  # share of its area that the centred crop leaves out

    @classmethod
    def of(cls, opaque: np.ndarray, shape: Shape = SQUARE) -> "Subject":
        """opaque: [H, W] bool, with a pixel at least. shape: of the crop."""
        rows, columns = (np.flatnonzero(opaque.any(axis)) for axis in (1, 0))
        left, top, wide, high = crop_to(shape, opaque.shape[1], opaque.shape[0], crop="center")
        kept = opaque[top : top + round(high), left : left + round(wide)].sum() / opaque.sum()
        return cls((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1), 1 - float(kept))


@dataclass(frozen=True)
class PhotoFacts:
    """What is found in a photo.

    height, width: pixels, upright. turned: EXIF says that the camera was turned, so it is shown rotated.
    profile: name of its colour profile; None without one. sharpness: see `sharpness`. bits: see
    `difference_hash`. subject: None where no mask and no transparency shows it. caption: the first that is
    written for it (`FolderCaptions`). mask_fault: why its mask file is not read, if it is not.
    """

    path: Path
    height: int
    width: int
    turned: bool
    profile: str | None
    sharpness: float
    bits: np.ndarray
    subject: Subject | None
    caption: str | None
    mask_fault: str | None = None

    @classmethod
    def of(
        cls,
        path: Path,
        masks: Sequence[Path] = (),
        *,
        shape: Shape = SQUARE,
        captions: FolderCaptions | None = None,
    ) -> "PhotoFacts":
        """Decodes a photo. masks: its mask files. shape: that training crops it to. captions: of its folder.

        Raises UserError if the photo cannot be decoded.
        """
        image = load_image(path)
        with open_image(path) as file:
            turned = file.getexif().get(ORIENTATION, 1) != 1
            profile = _profile_name(file.info.get("icc_profile"))
        subject, fault = _subject(path, masks, shape)
        return cls(
            path,
            image.height,
            image.width,
            turned,
            profile,
            sharpness(image),
            difference_hash(image),
            subject,
            _caption(path, FolderCaptions(path.parent) if captions is None else captions),
            fault,
        )

    @property
    def edges(self) -> list[str]:
        """The edges of the photo that the subject touches, where it is probably cut."""
        if self.subject is None:
            return []
        left, top, right, bottom = self.subject.box
        touched = {"left": left == 0, "top": top == 0}
        touched |= {"right": right == self.width, "bottom": bottom == self.height}
        return [name for name, is_there in touched.items() if is_there]

    @property
    def off_center(self) -> float:
        """How far the middle of the subject is from that of the photo, in sides; 0 where it is not known."""
        if self.subject is None:
            return 0.0
        left, top, right, bottom = self.subject.box
        return max(abs((left + right) / 2 / self.width - 0.5), abs((top + bottom) / 2 / self.height - 0.5))


def photo_facts(
    paths: Sequence[Path],
    *,
    mask_root: str | Path | None = None,
    shape_of: Callable[[Path], Shape] = lambda path: SQUARE,
) -> list[PhotoFacts]:
    """Decodes the photos of a folder, and their masks, which are beside them or in the folder `mask_root`.

    shape_of: -> what training crops a photo to.
    """
    folder = paths[0].parent if mask_root is None else Path(mask_root)
    named = masks_by_name(folder, of_masks_alone=folder.resolve() != paths[0].parent.resolve())
    captions = FolderCaptions(paths[0].parent)
    return [
        PhotoFacts.of(path, masks_of(path, named), shape=shape_of(path), captions=captions) for path in paths
    ]


def sharpness(image: Image.Image) -> float:
    """Variance of the Laplacian of grey levels 0 to 255 (Pech-Pacheco et al. 2000), at a fixed scale.

    At full size the value would tell of the camera's pixels; at the scale of training it tells of what is
    learned. Smaller images are measured as they are.
    """
    grey, short = image.convert("L"), min(image.size)
    if short > SHARPNESS_SIDE:
        size = tuple(round(side * SHARPNESS_SIDE / short) for side in image.size)
        grey = grey.resize(size, Image.Resampling.LANCZOS)
    levels = np.asarray(grey, dtype=np.float64)
    if min(levels.shape) < 3:
        return 0.0
    inner, across = levels[1:-1, 1:-1], levels[1:-1, :-2] + levels[1:-1, 2:]
    return float((levels[:-2, 1:-1] + levels[2:, 1:-1] + across - 4 * inner).var())


def difference_hash(image: Image.Image) -> np.ndarray:
    """Whether it becomes brighter to the right, at 16 x 16 places (a "dHash") -> [256] bool."""
    small = image.convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.LANCZOS)
    levels = np.asarray(small, dtype=int)
    return (levels[:, 1:] > levels[:, :-1]).ravel()


def near_twins(photos: Sequence[PhotoFacts]) -> list[tuple[PhotoFacts, PhotoFacts]]:
    """Pairs of photos that show almost the same."""
    pairs = combinations(photos, 2)
    return [(one, other) for one, other in pairs if int((one.bits != other.bits).sum()) <= TWINS]


def troubles(
    photos: Sequence[PhotoFacts], *, shapes: Mapping[Path, Shape] = EMPTY, captions: bool | None = None
) -> list[Trouble]:
    """What should be looked at before training, one entry for each kind.

    shapes: that photos are shown in, by path; without them nothing is said of photos that are too small.
    captions: whether the run reads the files beside the photos; None: not known.
    """

    def named(what: str, found: Sequence[PhotoFacts]) -> list[Trouble]:
        return [Trouble(what, tuple(photo.path.name for photo in found))] if found else []

    twins = [(one.path.name, other.path.name) for one, other in near_twins(photos)]
    small: dict[str, list[PhotoFacts]] = {}
    for photo in photos:
        shape = shapes.get(photo.path, SQUARE)
        if is_enlarged(shape, photo.width, photo.height):
            small.setdefault(str(shape.width) if shape.is_square else str(shape), []).append(photo)
    cut = [p for p in photos if p.subject is not None and not p.edges and p.subject.cut_by_crop > CUT]
    without = [photo for photo in photos if photo.caption is None]
    written = [photo for photo in photos if photo.caption is not None]
    unread = written if captions is False else []
    return [
        *[t for side in small for t in named(f"smaller than {side} pixels, so enlarged", small[side])],
        *named("blurred, which is learned", [p for p in photos if p.sharpness < LEAST_SHARP]),
        *[Trouble("nearly the same, so that they count twice", pair) for pair in twins],
        *named("the subject touches an edge, and may be cut there", [p for p in photos if p.edges]),
        *named("the crop of training cuts the subject; crop by hand", cut),
        *named("the subject is far from the middle", [p for p in photos if p.off_center > OFF_CENTER]),
        *[Trouble(p.mask_fault, (p.path.name,)) for p in photos if p.mask_fault is not None],
        *named("without a caption, though others have one", without if written and not unread else []),
        *named("captions that are not read, unless data.params.captions=true", unread),
    ]


def _profile_name(profile: bytes | None) -> str | None:
    if not profile:
        return None
    try:
        return ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile))).strip()
    except (ImageCms.PyCMSError, OSError, ValueError):
        return "a profile that cannot be read"


def _caption(path: Path, captions: FolderCaptions) -> str | None:
    """The first caption that is written for a photo; None if there is none that can be read."""
    try:
        found, _ = captions(path) or ((), None)
        return next((caption.text for caption in found), None)
    except UserError:  # which a run that reads captions says
        return None


def _subject(path: Path, masks: Sequence[Path], shape: Shape) -> tuple[Subject | None, str | None]:
    """Where the subject is, and why its mask is not read.

    None without a mask file and without transparency, or if all is of the subject, or nothing.
    """
    if len(masks) > 1:
        return None, f"it has {len(masks)} masks ({', '.join(file.name for file in masks)})"
    if masks:
        try:
            values = read_mask(masks[0], path)
        except UserError as error:  # which a run that has masks refuses
            return None, f"{error.what} ({masks[0].name})"
    else:
        alpha = alpha_channel(path)
        if alpha is None:
            return None, None
        values = np.asarray(alpha, dtype=np.float64) / 255
    inside = values >= OPAQUE
    return (Subject.of(inside, shape) if inside.any() and not inside.all() else None), None
