"""Gradient checkpointing (Chen et al. 2016), chosen by the free memory where a config leaves it open.

The choice changes no result: what is recomputed is equal to the bit (on a GPU, if its kernels are
deterministic). So a resumed run may choose anew.
"""

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch

from ldm.training import distributed
from ldm.training.device import free_memory
from ldm.training.memory import estimate

log = logging.getLogger(__name__)

NETWORKS = ("unet", "text_encoder")
MARGIN = 1.1  # over the estimate: fragmentation and workspace of kernels
CUDA_CONTEXT = 2**30  # bytes, about


def with_checkpointing_chosen(plain: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The config with true or false for every `use_checkpoint: null` of DreamBooth's networks.

    It is false, which is faster, if training without it fits the device's free memory in every process.
    """
    plain = copy.deepcopy(dict(plain))
    open_ones = [node for node in _params(plain) if node.get("use_checkpoint", False) is None]
    if not open_ones:
        return plain
    needed = sum(need.total for need in estimate(plain)[0].values())  # null counts as false there
    wanted = MARGIN * needed + (CUDA_CONTEXT if device.type == "cuda" else 0)
    free = min(distributed.all_gather_object(free_memory(device)))
    for node in open_ones:
        node["use_checkpoint"] = wanted > free
    log.info(
        "use_checkpoint: %s. Without it training takes about %.1f GiB, and %s has %.1f GiB free",
        str(wanted > free).lower(),
        wanted / 2**30,
        device,
        free / 2**30,
    )
    return plain


def _params(plain: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arguments of UNet and text encoder."""
    model = plain["model"].get("params", {})
    return [model[name]["params"] for name in NETWORKS if model.get(name, {}).get("params")]
