"""Gradient checkpointing (Chen et al. 2016), chosen by the free memory where a config leaves it open.

The choice changes no result: what is recomputed is equal to the bit (on a GPU, if its kernels are
deterministic). So a resumed run may choose anew.
"""

import logging
from dataclasses import replace

import torch

from ldm.config import with_params
from ldm.engine import distributed
from ldm.engine.device import free_memory
from ldm.runs.memory import estimate
from ldm.schema import RunConfig

log = logging.getLogger(__name__)

NETWORKS = ("unet", "text_encoder")
MARGIN = 1.1  # over the estimate: fragmentation and workspace of kernels
CUDA_CONTEXT = 2**30  # bytes, about


def with_checkpointing_chosen(config: RunConfig, device: torch.device) -> RunConfig:
    """The config with true or false for every `use_checkpoint: null` of DreamBooth's networks.

    It is false, which is faster, if training without it fits the device's free memory in every process.
    """
    params = config.model["params"]
    open_ones = [name for name in NETWORKS if _is_open(params[name].get("params") or {})]
    if not open_ones:
        return config
    needed = sum(need.total for need in estimate(config)[0].values())  # null counts as false there
    wanted = MARGIN * needed + (CUDA_CONTEXT if device.type == "cuda" else 0)
    free = min(distributed.all_gather_object(free_memory(device)))
    chosen = {name: with_params(params[name], {"use_checkpoint": wanted > free}) for name in open_ones}
    log.info(
        "use_checkpoint: %s. Without it training takes about %.1f GiB, and %s has %.1f GiB free",
        str(wanted > free).lower(),
        wanted / 2**30,
        device,
        free / 2**30,
    )
    return replace(config, model=with_params(config.model, chosen))


def _is_open(params: dict) -> bool:
    return "use_checkpoint" in params and params["use_checkpoint"] is None
