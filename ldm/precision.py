"""Precision of the networks while sampling: that of their weights, or a lower one under autocast."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from torch import nn

from ldm.models.unet import UNetModel

Precision = Literal["auto", "fp32", "bf16", "fp16"]
LOWER = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: Precision, device: str | torch.device) -> str:
    """ "auto" -> "bf16" on a CUDA device, "fp32" elsewhere; others as they are."""
    if precision != "auto":
        return precision
    return "bf16" if str(device).startswith("cuda") else "fp32"


def autocast_for(precision: Precision, *networks: nn.Module) -> torch.autocast:
    """Mixed precision by autocast, while these networks sample; "fp32" disables that of a training run.

    Weights keep their dtype and are cast at each use, as inference mode caches no casts. Networks whose
    weights all have a lower dtype compute in it.
    """
    weights = [next(network.parameters()) for network in networks]
    device = weights[0].device
    dtype = LOWER.get(resolve_precision(precision, device))
    lowers = dtype is not None and any(weight.dtype == torch.float32 for weight in weights)
    return torch.autocast(device.type, dtype=dtype, enabled=lowers)


@contextmanager
def vae_precision(unet: UNetModel, device: torch.device) -> Iterator[None]:
    """Around a VAE's work: without float16 autocast, if it is SDXL's, by its UNet.

    SDXL's VAE overflows in float16, and images come out black; bfloat16, which has float32's range, stays.
    """
    if unet.adm_in_channels is None:
        yield
        return
    lowers = torch.is_autocast_enabled(device.type)
    half = lowers and torch.get_autocast_dtype(device.type) == torch.float16
    with torch.autocast(device.type, enabled=False) if half else nullcontext():
        yield
