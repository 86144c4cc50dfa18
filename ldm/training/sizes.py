"""Bytes of what an optimizer keeps and of a checkpoint, before either exists."""

from torch import Tensor, nn

BLOCK, SMALL = 256, 4096  # bitsandbytes: weights per scale; smaller tensors keep float32 states


def state_bytes(parameter: Tensor, optimizer: str) -> int:
    """What AdamW keeps beside one weight tensor: two moments, and where it is a tensor the step."""
    count = parameter.numel()
    if optimizer == "adamw_bf16":
        return 2 * parameter.nbytes
    if optimizer == "adamw_8bit" and count >= SMALL:
        return 2 * (count + 4 * -(-count // BLOCK))
    return 2 * 4 * count + (4 if optimizer == "adamw" else 0)


def checkpoint_bytes(module: nn.Module, *, averaged: bool) -> int:
    """Bytes of a checkpoint's tensors: weights, optimizer states, and the float32 average of what learns.

    The average stands beside the weights; what is frozen is written once. A module that names no
    `optimizer` has torch's AdamW.
    """
    weights = sum(tensor.nbytes for tensor in module.state_dict().values())
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    states = sum(state_bytes(p, getattr(module, "optimizer", "adamw")) for p in learning)
    average = sum(4 * p.numel() for p in learning) if averaged else 0
    return weights + states + average
