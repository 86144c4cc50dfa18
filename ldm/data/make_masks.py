"""Masks made by a network for photos that have none, and a contact sheet to check them by."""

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.contact_sheet import contact_sheet
from ldm.data.images import list_images, load_image
from ldm.data.masks import LEAST_WHITE, has_alpha, masks_by_name, masks_of, read_mask
from ldm.errors import UserError
from ldm.files import atomic_write

log = logging.getLogger(__name__)

Segment = Callable[[Image.Image], Image.Image]  # RGB photo -> its mask, mode L, of the same size
BY_HAND = "draw NAME.mask.png by hand"
MOST_REASON = 120  # characters of a library's message
CELL, DIMMED = 256, 0.2  # pixels a side in the sheet; brightness of what a mask leaves out


def rembg_segment(model: str) -> Segment:
    """The function of a network that rembg names and loads, such as u2net (Qin et al. 2020).

    Raises UserError where the package is not installed, or the network's weights cannot be had.
    """
    try:
        import rembg
    except (ImportError, SystemExit) as error:  # it ends the program where onnxruntime is missing
        package = "rembg" if isinstance(error, ImportError) else "onnxruntime for rembg"
        remedy = f'Install it with `pip install -e ".[masks]"`, or {BY_HAND}.'
        raise UserError(f"Making masks needs {package}, which is not installed", remedy=remedy) from error
    try:
        session = rembg.new_session(model)
    except ValueError as error:
        what, remedy = "rembg knows no such network", "See the names in rembg's documentation."
        raise UserError(what, where=model, remedy=remedy) from error
    except Exception as error:  # of its download, which is from GitHub, or of the file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        what = f"The network's weights cannot be had: {reason[:MOST_REASON]}"
        remedy = f"Put {model}.onnx, of github.com/danielgatis/rembg's releases, into ~/.u2net, or {BY_HAND}."
        raise UserError(what, where=model, remedy=remedy) from error
    return lambda photo: rembg.remove(photo, session=session, only_mask=True)


def make_masks(folder: str | Path, segment: Segment) -> dict[Path, Path]:
    """Writes `NAME.mask.png` beside each photo without a mask -> photo -> file that holds its mask.

    A mask that is there, or an alpha channel, stays as it is. A photo in which nothing is found has none
    afterwards, with a warning.
    """
    photos = list_images(folder)
    stems = Counter(path.stem for path in photos)
    named, found = masks_by_name(Path(folder)), {}
    for path in photos:
        there = masks_of(path, named)
        if there or has_alpha(path):
            found[path] = there[0] if there else path
            continue
        photo = load_image(path)
        mask = segment(photo).convert("L")
        if mask.size != photo.size:
            raise ValueError(f"the mask of {path} has the size {mask.size}, the photo {photo.size}")
        if mask.getextrema()[1] < LEAST_WHITE:
            log.warning("%s: no subject was found; draw its mask by hand", path)
            continue
        name = path.stem if stems[path.stem] == 1 else path.name
        found[path] = path.with_name(f"{name}.mask.png")
        with atomic_write(found[path]) as temporary:
            mask.save(temporary, format="PNG")
    return found


def sheet(masks: dict[Path, Path]) -> Image.Image:
    """A row for each photo: itself, its mask, and what is left of it inside. masks: of `make_masks`."""
    rows = []
    for path, file in masks.items():
        photo, mask = load_image(path), read_mask(file, path)
        weights = DIMMED + (1 - DIMMED) * mask[:, :, None]
        inside = Image.fromarray((np.asarray(photo) * weights).round().astype(np.uint8))
        grey = Image.fromarray((255 * mask).round().astype(np.uint8))
        title = f"{path.name}, {'its alpha channel' if file == path else file.name}: {mask.mean():.0%} inside"
        rows.append((title, [_small(image) for image in (photo, grey, inside)]))
    return contact_sheet(rows, cell=1)


def _small(image: Image.Image) -> Image.Image:
    scale = CELL / max(image.size)
    return image.convert("RGB").resize([max(1, round(side * scale)) for side in image.size])
