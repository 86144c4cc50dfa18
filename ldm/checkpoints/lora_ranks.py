"""T-LoRA's ranks in the metadata of a LoRA file: tools that do not read it take all ranks at any timestep."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.checkpoints.tensors import read_tensors
from ldm.errors import UserError
from ldm.files import parse_json

KEY = "ldm.rank_by_timestep"
NUMBERS = ("rank", "min_rank", "timesteps")


def ranks_metadata(ranks: Mapping[str, int]) -> dict[str, str]:
    """ranks: "rank", "min_rank" and "timesteps", see `ldm.models.rank_by_timestep` -> metadata of a file."""
    return {KEY: json.dumps({name: ranks[name] for name in NUMBERS})}


def check_ranks(layers: Mapping[str, Mapping[str, Any]], ranks: Mapping[str, int], *, where: Path) -> None:
    """Raises UserError where layers of the UNet, of `read_lora`, have other ranks than `ranks` tells.

    Those whose factors began orthonormal have twice as many: what has become of them, less what they were.
    """
    rank = ranks["rank"]
    found = {len(weights[0]) for weights in layers["unet"].values() if isinstance(weights, tuple)}
    if odd := sorted(found - {rank, 2 * rank}):
        what = f"`{KEY}` in the metadata tells of rank {rank}, and there are layers of rank {odd[0]}"
        raise UserError(what, where=where, remedy="Use the file as it was trained, or take the metadata off.")


def read_ranks(path: str | Path) -> dict[str, int] | None:
    """The ranks that the metadata of a LoRA file tell; None for a LoRA that is the same at all timesteps.

    Raises UserError for numbers that no LoRA has.
    """
    if not Path(path).is_file():
        return None  # PEFT's folders have none
    text = read_tensors(Path(path))[1].get(KEY)
    if text is None:
        return None
    try:
        told = parse_json(text)
    except ValueError:
        told = None
    numbers = [told.get(name) for name in NUMBERS] if isinstance(told, dict) else [None]
    if any(type(number) is not int for number in numbers) or not 1 <= numbers[1] <= numbers[0] <= 2**16:
        raise UserError(f"`{KEY}` in the metadata does not tell ranks", where=path)
    if not 1 <= numbers[2] <= 10**6:
        raise UserError(f"`{KEY}` in the metadata does not tell timesteps", where=path)
    return dict(zip(NUMBERS, numbers, strict=True))
