"""Group normalization and SiLU, as one layer."""

import importlib.util
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """Group normalization (Wu & He 2018), with SiLU after it if asked for. [B, C, h, w] -> the same.

    `fused`: on a GPU, with Triton, and where nothing is compiled, it is that of `group_norm_triton`. On a CPU
    PyTorch's channels_last backward crashes where the input needs no gradient; such an input is copied.
    """

    def __init__(self, num_groups: int, channels: int, *, eps: float = 1e-5, silu: bool = False):
        super().__init__(num_groups, channels, eps=eps)
        self.silu = silu
        self.fused = True

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and x.is_cuda and self.fused and has_triton():
            from ldm.models.group_norm_triton import group_norm  # it imports Triton

            how = {"groups": self.num_groups, "eps": self.eps, "silu": self.silu}
            return group_norm(x, self.weight, self.bias, **how)
        y = super().forward(x if x.requires_grad or not torch.is_grad_enabled() else x.contiguous())
        return F.silu(y) if self.silu else y


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def fuse(network: nn.Module, fused: bool) -> None:
    """Says of all group norms of a network whether they may be `fused`."""
    for layer in network.modules():
        if isinstance(layer, GroupNorm):
            layer.fused = fused
