"""Ranges of the data section's numbers, for those who build a data module without a config."""

from collections.abc import Mapping
from typing import Any

from ldm.errors import UserError

LEAST = {
    "size": 1,
    "batch_size": 1,
    "prior_batch_size": 0,
    "num_priors": 0,
    "num_workers": 0,
    "accumulate": 1,
    "validation_batches": 0,
}


def check_ranges(settings: Mapping[str, Any], *, size_multiple: int) -> None:
    """Raises UserError for a number out of its range. size_multiple: pixels, of which size is a multiple."""
    for name, bound in LEAST.items():
        if settings[name] < bound:
            remedy = f"It must be at least {bound}."
            raise UserError(f"{name} is {settings[name]}", where=name, remedy=remedy)
    if settings["crop_variants"] is not None and settings["crop_variants"] < 1:
        raise UserError("There is no crop to choose", where="crop_variants", remedy="Choose 1 or more.")
    size = settings["size"]
    if size % size_multiple:
        near = max(size_multiple, round(size / size_multiple) * size_multiple)
        remedy = f"It must be a multiple of {size_multiple}; {near} is near."
        raise UserError(f"size is {size} pixels", where="size", remedy=remedy)
    for name in ("caption_dropout", "prior_caption_dropout"):
        if not 0 <= settings[name] <= 1:
            remedy = "Choose from 0 to 1."
            raise UserError(f"{settings[name]} is not a share", where=name, remedy=remedy)
