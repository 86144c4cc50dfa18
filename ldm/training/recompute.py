"""Gradient checkpointing where a config leaves it to the free memory (Chen et al. 2016).

The choice changes no result: what is computed again is the same to the bit (on a GPU, as far as its kernels
repeat themselves). So a run that is resumed may choose anew.
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
MARGIN = 1.1  # of what is computed: the allocator's holes and the kernels' work space
CUDA_CONTEXT = 2**30  # bytes, about


def with_checkpointing_chosen(plain: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The config with true or false for every `use_checkpoint: null` of DreamBooth's networks.

    False, which is faster, where the training without it fits into the device's free memory in every process.
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
