"""Modules as a config's node builds them."""

from collections.abc import Mapping
from typing import Any

from ldm.annotations import Node
from ldm.config import instantiate
from ldm.training.latent_diffusion import LatentDiffusion
from ldm.training.optimizer_nodes import FUSED_BACKWARD, OptimizerNode


def lean(optimizer: OptimizerNode) -> Node:
    """The node of a fused backward pass."""
    return {"target": FUSED_BACKWARD, "params": {"optimizer": optimizer}}


MIN_SNR = {"target": "ldm.training.objective.MinSNR", "params": {"gamma": 5.0}}
LEAN = lean("adamw")
LEAN_BF16 = lean("adamw_bf16")
TAUGHT = {"objective": {"prior_target": "teacher"}}


def build_module(
    params: Mapping[str, Any], kind: type[LatentDiffusion] = LatentDiffusion, **more: Any
) -> LatentDiffusion:
    """params: of a model section, such as the fixture `tiny_config`; more: those that differ."""
    return instantiate({"target": f"{kind.__module__}.{kind.__name__}", "params": {**params, **more}})
