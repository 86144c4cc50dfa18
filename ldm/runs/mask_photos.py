"""Masks for photos, and their contact sheet: what `make_masks.py` does."""

from argparse import Namespace
from pathlib import Path

from ldm.data.make_masks import make_masks, rembg_segment, sheet
from ldm.files import atomic_write


def mask_photos(options: Namespace) -> Path:
    """Makes the masks that are missing -> the contact sheet."""
    masks = make_masks(options.folder, rembg_segment(options.model))
    folder = options.folder.resolve()
    path = options.sheet or folder.with_name(f"{folder.name}-masks.png")
    with atomic_write(path) as temporary:
        sheet(masks).save(temporary, format="PNG")
    return path
