"""LoRA extraction: the best low-rank approximation of what a training has changed in a model's layers."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.checkpoints.load import Model
from ldm.checkpoints.lora import LoRAWeights, StateDicts
from ldm.errors import UserError
from ldm.models.lora import KINDS, layer_names

OTHER_BASE = "Name the model that it was trained from as BASE."


class Extracted(NamedTuple):
    """layers: see `ldm.checkpoints.lora`. kept: share of the squared change that they hold, 0 to 1.

    elsewhere: share of it in tensors that a LoRA has no layer for: norms, biases, embeddings, other layers.
    """

    layers: dict[str, dict[str, LoRAWeights]]
    kept: float
    elsewhere: float


def extract_lora(
    tuned: StateDicts, base: StateDicts, *, rank: int, adaptable: Mapping[str, re.Pattern[str]], where: object
) -> Extracted:
    """The LoRA that, added to the base, is nearest to the tuned model in every weight.

    Of the change W - W_base of a linear layer or a convolution [out, in, ...], as a matrix [out, in ...], it
    is the part of the largest `rank` singular values (Eckart and Young 1936): no other matrices of this rank
    come nearer, and the squared error is the sum of the squares of the other singular values. Layers that
    have not changed are left out. One weight is in memory at a time.

    adaptable: network -> the names of its layers that a LoRA may have. Raises UserError for models of
    different shapes, or for the same one twice.
    """
    layers: dict[str, dict[str, LoRAWeights]] = {network: {} for network in adaptable}
    total = inside = kept = 0.0
    for network, name, change in _changes(tuned, base, adaptable, where=where):
        squared = float(change.double().square().sum())
        if not math.isfinite(squared):
            what = f"`{name}` of the model or of its base has values that are not finite"
            raise UserError(what, where=where, remedy="Use files that were not damaged in training.")
        total += squared
        layer = name.removesuffix(".weight")
        fits = name.endswith(".weight") and change.ndim in (2, 4) and adaptable[network].search(layer)
        if squared == 0 or not fits:
            continue
        down, up, error = low_rank(change, rank)
        layers[network][layer] = (down, up, float(len(down)))
        inside += squared
        kept += squared - error
    if inside == 0:
        what = "No layer of a LoRA differs between the two models"
        raise UserError(what, where=where, remedy=OTHER_BASE)
    return Extracted(layers, kept / total, 1 - inside / total)


def lora_between(model: Model, base: Model, rank: int) -> Extracted:
    """`extract_lora` of two models, in all layers that a LoRA may have."""
    adaptable = {network: layer_names(kinds, kinds) for network, kinds in KINDS.items()}
    return extract_lora(model.state_dicts, base.state_dicts, rank=rank, adaptable=adaptable, where=base.path)


def low_rank(change: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """change: [out, in, ...] -> down [r, in, ...] and up [out, r, ...], whose product is nearest to it.

    Also the squared error. Both factors have the square roots of the singular values; r is `rank`, or what
    the matrix has.
    """
    outside, inside, *kernel = change.shape
    left, values, right = torch.linalg.svd(change.flatten(1), full_matrices=False)
    r = min(rank, len(values))
    roots = values[:r].sqrt()
    down = (roots[:, None] * right[:r]).reshape(r, inside, *kernel)
    up = (left[:, :r] * roots).reshape(outside, r, *[1] * len(kernel))
    return down.contiguous(), up.contiguous(), float(values[r:].double().square().sum())


def _changes(
    tuned: StateDicts, base: StateDicts, networks: Mapping[str, object], *, where: object
) -> Iterator[tuple[str, str, Tensor]]:
    """Network, name of a tensor, its change in float32."""
    for network in networks:
        own, theirs = tuned[network], base[network]
        for name in own:
            if name not in theirs:
                raise UserError(f"The base has no `{name}`", where=where, remedy=OTHER_BASE)
            one = own[name]
            other = theirs[name]
            if one.shape != other.shape:
                what = f"`{name}` has shape {tuple(one.shape)}, and in the base {tuple(other.shape)}"
                raise UserError(what, where=where, remedy=OTHER_BASE)
            if one.is_floating_point():
                yield network, name, one.float() - other.float()
