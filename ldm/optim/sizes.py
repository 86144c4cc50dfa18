"""Bytes of what an optimizer keeps and of a checkpoint, before either exists."""

import json
from functools import lru_cache

import torch
from torch import Tensor, nn

from ldm.optim.adamw_bf16 import AdamWBF16
from ldm.optim.optimizer_nodes import (
    OptimizerNode,
    averages_weights,
    build,
    kind_of,
    optimizer_of,
    stepping,
)

BLOCK, SMALL = 256, 4096  # bitsandbytes: weights per scale; smaller tensors keep float32 states


def state_bytes(parameter: Tensor, optimizer: OptimizerNode) -> int:
    """What an optimizer keeps beside one weight tensor; AdamW: two moments, and the step as a tensor.

    An optimizer that is not known here is asked, on the CPU; one that cannot step there counts as AdamW.
    """
    count, node = parameter.numel(), stepping(optimizer)
    if node["target"].startswith("bitsandbytes."):
        return 2 * (count + 4 * -(-count // BLOCK)) if count >= SMALL else 2 * 4 * count
    kind = kind_of(optimizer)
    if issubclass(kind, AdamWBF16):
        return 2 * count * (kind.moments_dtype or parameter.dtype).itemsize
    if issubclass(kind, torch.optim.AdamW) and not (node.get("params") or {}).get("amsgrad"):
        return 2 * 4 * count + 4
    return _asked(json.dumps(node), tuple(parameter.shape), parameter.dtype)


@lru_cache(maxsize=1024)
def _asked(node: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of the states that an optimizer has after a step on a weight of this shape."""
    weight = nn.Parameter(torch.ones(shape, dtype=dtype, device="cpu"))
    weight.grad = torch.zeros_like(weight)
    try:
        optimizer = build(json.loads(node), [{"params": [weight], "lr": 1e-3}])
        if averages_weights(json.loads(node)):
            optimizer.train()
        optimizer.step()
    except Exception:  # of any kind, by whoever wrote the class
        return 2 * 4 * weight.numel() + 4
    return sum(x.nbytes for x in optimizer.state[weight].values() if torch.is_tensor(x))


def checkpoint_bytes(module: nn.Module, *, averaged: bool) -> int:
    """Bytes of a checkpoint's tensors: weights, optimizer states, and the float32 average of what learns.

    The average, a callback's or the optimizer's, stands beside the weights; what is frozen is written once.
    """
    weights = sum(tensor.nbytes for tensor in module.state_dict().values())
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = optimizer_of(module)
    states = sum(state_bytes(p, optimizer) for p in learning)
    average = sum(4 * p.numel() for p in learning) if averaged or averages_weights(optimizer) else 0
    return weights + states + average
