"""Colour profiles: an image's own colours, by its ICC profile, converted to sRGB."""

import io
import logging
from functools import cache, lru_cache
from pathlib import Path

from PIL import Image, ImageChops, ImageCms

log = logging.getLogger(__name__)

SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # colour space of a profile -> Pillow's mode
GREY_MODES, COLOR_MODES = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "RGBX", "YCbCr")
ONE_LEVEL = 1  # of 255: a profile that moves no colour further is sRGB


def to_srgb(image: Image.Image, *, where: str | Path) -> Image.Image:
    """The image in sRGB, by the profile that it carries: RGB, or RGBA where it has transparency.

    As usual for photographs the intent is relative colorimetric, with black point compensation. Without a
    profile, with sRGB's and with one that cannot be used, which is said in the log, the image stays as it is.
    """
    if "icc_profile" not in image.info:
        return image
    profile = image.info["icc_profile"]
    try:
        if not profile:  # Pillow leaves it empty where its parts cannot be put together
            raise ValueError("it is damaged")
        mode = _mode_of(profile, image)
        transform = _transform(profile, mode)
        if transform is None:
            return image
        over = image.convert("RGBA") if image.has_transparency_data else None
        converted = ImageCms.applyTransform(image.convert(mode), transform)
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        _warn_once(f"{where}: its colour profile cannot be used ({error}), so it is read as sRGB")
        return image
    if over is not None:
        converted.putalpha(over.getchannel("A"))
    return converted


def _mode_of(profile: bytes, image: Image.Image) -> str:
    """The mode in which a profile takes this image. Raises ValueError if it is for other images."""
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = opened.profile.xcolor_space.strip()
    mode = SPACES.get(space)
    takes = {"RGB": (*COLOR_MODES, *GREY_MODES), "L": GREY_MODES, "CMYK": ("CMYK",)}.get(mode, ())
    if image.mode not in takes:
        raise ValueError(f"it is for {space or 'no'} values, the image has {image.mode}")
    return mode


@lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Pixels of a mode -> sRGB; None if the profile is sRGB."""
    transform = ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    if mode == "CMYK":
        return transform
    levels = _levels(mode)
    moved = ImageChops.difference(ImageCms.applyTransform(levels, transform), levels.convert("RGB"))
    return transform if max(high for _, high in moved.getextrema()) > ONE_LEVEL else None


@cache
def _levels(mode: str) -> Image.Image:
    """Every 17th level of each channel with all of the others -> [1, 16^3] pixels; of grey all 256 levels."""
    if mode == "L":
        return Image.frombytes("L", (256, 1), bytes(range(256)))
    steps = range(0, 256, 17)
    pixels = bytes(value for r in steps for g in steps for b in steps for value in (r, g, b))
    return Image.frombytes("RGB", (len(steps) ** 3, 1), pixels)


@cache
def _warn_once(message: str) -> None:
    log.warning(message)
