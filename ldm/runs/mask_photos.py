"""Masks for photos, and their contact sheet: what `make_masks.py` does."""

from argparse import Namespace
from pathlib import Path

from ldm.data.make_masks import make_masks, rembg_segment, sheet
from ldm.errors import UserError
from ldm.files import atomic_write, make_folder


def mask_photos(options: Namespace) -> Path:
    """Makes the masks that are missing -> the contact sheet."""
    folder = options.folder.resolve()
    path = options.sheet or folder.with_name(f"{folder.name}-masks.png")
    if path.resolve().parent == folder:
        remedy = "Choose another folder: there it would be taken for a photo."
        raise UserError("The contact sheet would lie among the photos", where=path, remedy=remedy)
    if options.sheet is not None:
        make_folder(path.parent)  # before the work whose results it is for
    masks = make_masks(options.folder, rembg_segment(options.model))
    with atomic_write(path) as temporary:
        sheet(masks).save(temporary, format="PNG")
    return path
