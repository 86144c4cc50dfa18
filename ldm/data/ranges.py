"""Ranges of a data module's numbers, which a config's schema says too, for those who build one in Python."""

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
SHARES = ("caption_dropout", "prior_caption_dropout")


def check_ranges(values: Mapping[str, Any], *, size_multiple: int) -> None:
    """Raises UserError for the first number out of its range. values: attributes of a data module."""
    for name, bound in LEAST.items():
        if values[name] < bound:
            remedy = f"It must be at least {bound}."
            raise UserError(f"{name} is {values[name]}", where=name, remedy=remedy)
    if values["crop_variants"] is not None and values["crop_variants"] < 1:
        raise UserError("There is no crop to choose", where="crop_variants", remedy="Choose 1 or more.")
    size = values["size"]
    if size % size_multiple:
        near = max(size_multiple, round(size / size_multiple) * size_multiple)
        remedy = f"It must be a multiple of {size_multiple}; {near} is near."
        raise UserError(f"size is {size} pixels", where="size", remedy=remedy)
    for name in SHARES:
        if not 0 <= values[name] <= 1:
            raise UserError(f"{values[name]} is not a share", where=name, remedy="Choose from 0 to 1.")
