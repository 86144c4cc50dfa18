"""Image files: listing, decoding, cropping, and conversion from and to [3, H, W] in [-1, 1]."""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal, overload

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH
from torch import Tensor

from ldm.data.buckets import Shape
from ldm.data.captions import SIDECARS
from ldm.data.color import to_srgb
from ldm.errors import UserError

log = logging.getLogger(__name__)

# Only decoders inside Pillow and pillow-heif: others, such as EPS, run external programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")  # JPEG includes phones' MPO
HEIC = (".heic", ".heif")  # phones; without pillow-heif they are refused, not ignored
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .avif .ppm .pgm".split() + list(HEIC)
)
MASK_ENDINGS = (
    ".mask",
    "-masklabel",
)  # of a mask's stem, after that of its photo; the second is OneTrainer's
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # tag of EXIF, and its values for a quarter turn
RESAVE = "Convert it to an ordinary JPEG or PNG, or remove it."
INSTALL = 'Install it with `pip install -e ".[heic]"`, or convert the photo to JPEG.'


@cache
def formats() -> tuple[str, ...]:
    """The formats that can be read: HEIC, too, where the extra `heic` is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return FORMATS
    register_heif_opener()
    return *FORMATS, "HEIF"


@contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """An image file, of which only the header is read.

    Raises OSError, and what Pillow raises for files that it does not know.
    """
    # By its path Pillow maps a raw TIFF of mode L or RGBA into memory, a turned one by a wrong width.
    with open(path, "rb") as stream:
        try:
            file = Image.open(stream, formats=formats())
        except UnidentifiedImageError as error:  # which names the stream
            raise UnidentifiedImageError(f"cannot identify image file {str(path)!r}") from error
        with file:
            yield file


def list_images(folder: str | Path, *, skip_unreadable: bool = False) -> list[Path]:
    """Image files directly in `folder`, sorted by name; each is decoded completely as a check.

    Hidden files, subfolders and files that neither decode nor have the suffix of an image are ignored, with a
    log line; so are masks (`photo_of_mask`). Raises UserError for an image that cannot be decoded, unless
    `skip_unreadable`, for a mask without its photo, and for a folder without images.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):  # `Path.is_dir` raises for names that are too long
        remedy = "Name the folder that it is in." if os.path.isfile(folder) else "Check the path."
        raise UserError("There is no such folder of images", where=folder, remedy=remedy)
    images, masks, stray, unreadable = [], [], [], []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_file():
            stray.append(path)
            continue
        if photo_of_mask(path) is not None:
            masks.append(path)
            continue
        try:
            load_image(path)
            images.append(path)
        except UserError as error:
            if path.suffix.lower() not in SUFFIXES:
                stray.append(path)
            elif not skip_unreadable:
                raise
            else:
                unreadable.append(path)
                log.warning("Skipped: %s", error)
    _say_strays(stray, (*images, *unreadable))
    _check_photos_of(masks, (*images, *unreadable))
    if not images:
        found = f"{len(unreadable)} unreadable images" if unreadable else "no image"
        raise UserError(
            f"The folder holds {found}",
            where=folder,
            remedy="Put photos (JPEG, PNG, WebP, ...) directly into it; subfolders are not searched.",
        )
    return images


def _say_strays(files: Sequence[Path], photos: Sequence[Path]) -> None:
    """Says which files are ignored; a photo's captions are none of them."""
    stems = {path.stem for path in photos}
    stray = [path for path in files if path.suffix not in SIDECARS or path.stem not in stems]
    if stray:
        names = ", ".join(path.name for path in stray)
        log.info("%s: ignored files that are not images: %s", stray[0].parent, names)


def _check_photos_of(masks: Sequence[Path], photos: Sequence[Path]) -> None:
    """Says which files are masks; raises UserError for one whose photo is not there."""
    if masks:
        log.info("%s: masks, not photos: %s", masks[0].parent, ", ".join(mask.name for mask in masks))
    names = {name for path in photos for name in (path.stem, path.name)}
    for alone in (mask for mask in masks if photo_of_mask(mask) not in names):
        remedy = "Name it after its photo, such as dog.mask.png for dog.jpg, or remove it."
        raise UserError("The photo of this mask is not there", where=alone, remedy=remedy)


def photo_of_mask(path: Path) -> str | None:
    """The stem, or the name, of the photo that a file is the mask of, by its own name: "dog" of
    dog.mask.png and dog-masklabel.png; None for any other file."""
    stem = path.stem.lower()
    ending = next((ending for ending in MASK_ENDINGS if stem.endswith(ending)), None)
    is_mask = ending is not None and path.suffix.lower() in SUFFIXES
    return path.stem[: -len(ending)] if is_mask else None


def load_image(path: str | Path) -> Image.Image:
    """The first frame of an image file as 8-bit sRGB, rotated by its EXIF orientation, on a white background.

    Colours are converted by the file's ICC profile. Raises UserError for a file that cannot be decoded, or is
    too large.
    """
    try:
        with open_image(path) as file:
            file.load()  # decodes to the end, so that truncation shows here
            return _to_rgb(ImageOps.exif_transpose(file), where=path)
    except FileNotFoundError as error:
        raise UserError("There is no such image", where=path, remedy="Check the path.") from error
    except Image.DecompressionBombError as error:
        raise UserError(
            f"The image is too large: {error}",
            where=path,
            remedy="Scale it down; training needs no more than a few thousand pixels a side.",
        ) from error
    except Exception as error:  # decoders raise anything on damaged files
        if "HEIF" not in formats() and Path(path).suffix.lower() in HEIC:
            what = "HEIC, the format of phones, is read by pillow-heif, which is not installed"
            raise UserError(what, where=path, remedy=INSTALL) from error
        raise UserError(f"The image cannot be read: {error}", where=path, remedy=RESAVE) from error


def alpha_channel(path: str | Path) -> Image.Image | None:
    """The alpha channel of an image file, upright, of mode L; None if it has none."""
    with open_image(path) as file:
        if not file.has_transparency_data:
            return None
        return _of_8_bits(ImageOps.exif_transpose(file)).convert("RGBA").getchannel("A")


def upright_size(path: str | Path) -> tuple[int, int]:
    """(height, width) in pixels as `load_image` gives it, rotated by EXIF; only the header is read."""
    with open_image(path) as file:
        width, height = file.size
        if file.format == "TIFF":  # Pillow's size is the upright one already, in some versions
            width, height = file.tag_v2[IMAGEWIDTH], file.tag_v2[IMAGELENGTH]
        turned = file.getexif().get(ORIENTATION, 1) in TURNED
        return (width, height) if turned else (height, width)


class ImageFiles(Sequence[Image.Image]):
    """Images that are decoded when they are asked for, and not kept: many large photos fit in no memory.

    A slice decodes nothing either.
    """

    def __init__(self, paths: Iterable[str | Path]):
        self.paths = tuple(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Image.Image]:
        return map(load_image, self.paths)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> "ImageFiles": ...
    def __getitem__(self, index: int | slice) -> "Image.Image | ImageFiles":
        return ImageFiles(self.paths[index]) if isinstance(index, slice) else load_image(self.paths[index])


def fit_image(
    image: Image.Image,
    size: int | Shape,
    *,
    crop: Literal["center", "random"] = "center",
    flip: bool = False,
    generator: torch.Generator | None = None,
) -> Image.Image:
    """Crops the largest part of a shape, centred or at random, and resizes it to that (Lanczos).

    size: pixels a side of a square, or the shape. flip: mirrored horizontally. generator: of the random crop.
    """
    shape = Shape.square(size) if isinstance(size, int) else size
    left, top, width, height = crop_to(shape, *image.size, crop=crop, generator=generator)
    box = (left, top, left + width, top + height)
    fitted = image.resize((shape.width, shape.height), Image.Resampling.LANCZOS, box=box)
    return ImageOps.mirror(fitted) if flip else fitted


def crop_to(
    shape: Shape,
    width: int,
    height: int,
    *,
    crop: Literal["center", "random"],
    generator: torch.Generator | None = None,
) -> tuple[int, int, float, float]:
    """(left, top, width, height) in pixels of the largest crop with the aspect ratio of a shape.

    Its corner is at a whole pixel, centred or at random; its longer side may end within one.
    """
    wide = min(width, height * shape.width / shape.height)
    high = min(height, width * shape.height / shape.width)
    room = int(width - wide), int(height - high)
    if crop == "random":
        left, top = (int(torch.randint(free + 1, (), generator=generator)) for free in room)
    else:
        left, top = (free // 2 for free in room)
    return left, top, wide, high


def is_enlarged(shape: Shape, width: int, height: int) -> bool:
    """Whether an image has fewer pixels than a shape that it is cropped to."""
    return crop_to(shape, width, height, crop="center")[2] < shape.width


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> [3, H, W] float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))
    return (pixels / 127.5 - 1).permute(2, 0, 1).contiguous()


def to_image(pixels: Tensor) -> Image.Image:
    """[3, H, W] in [-1, 1] (clamped, any dtype or device) -> RGB image; the exact inverse of `to_tensor`."""
    levels = ((pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round()
    return Image.fromarray(levels.to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def _to_rgb(image: Image.Image, *, where: str | Path) -> Image.Image:
    """Any mode -> sRGB; transparency becomes white."""
    image = to_srgb(_of_8_bits(image), where=where)
    if image.has_transparency_data:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
    return image.convert("RGB")


def _of_8_bits(image: Image.Image) -> Image.Image:
    """16-bit grey is scaled, where Pillow would clip it; its transparent level becomes an alpha channel."""
    if image.mode == "F":
        raise ValueError("floating-point values have no known range")
    if not image.mode.startswith("I"):
        return image
    grey = np.asarray(image, dtype=np.float64)
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError("32-bit grey values have no known range")
    scaled = Image.fromarray((grey / 257).round().astype(np.uint8))
    about = dict(image.info)
    level = about.pop("transparency", None)
    if level is not None:
        scaled.putalpha(Image.fromarray(np.where(grey == level, 0, 255).astype(np.uint8)))
    scaled.info |= about
    return scaled
