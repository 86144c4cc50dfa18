"""Optimizers as a config names them: short names, or nodes of any class that is allowed."""

import io
from contextlib import redirect_stdout
from typing import Annotated, Any, Literal

import torch
from torch.optim import Optimizer

from ldm.annotations import Builds, Node
from ldm.config import instantiate, takes
from ldm.targets import OPTIONAL, get_class

OptimizerName = Literal[
    "adamw", "adamw_8bit", "adamw_bf16", "adamw_bf16_moments", "adafactor", "lion", "prodigy", "schedule_free"
]
OptimizerNode = OptimizerName | Annotated[Node, Builds(Optimizer)]
SHORT = {  # name -> class
    "adamw": "ldm.optim.fused_adamw.FusedAdamW",
    "adamw_8bit": "bitsandbytes.optim.AdamW8bit",
    "adamw_bf16": "ldm.optim.adamw_bf16.AdamWBF16",
    "adamw_bf16_moments": "ldm.optim.adamw_bf16.AdamWBF16Moments",
    "adafactor": "torch.optim.Adafactor",
    "lion": "ldm.optim.lion.Lion",
    "prodigy": "prodigyopt.Prodigy",
    "schedule_free": "schedulefree.AdamWScheduleFree",
}
FUSED_BACKWARD = "ldm.optim.fused_backward.FusedBackward"


def node_of(optimizer: OptimizerNode, *, fused: bool = True) -> Node:
    """The node that a short name stands for, or the node itself. "adamw" without `fused` is torch's own."""
    if not isinstance(optimizer, str):
        return optimizer
    return {"target": "torch.optim.AdamW" if optimizer == "adamw" and not fused else SHORT[optimizer]}


def stepping(optimizer: OptimizerNode) -> Node:
    """The node of what steps the weights: of a fused backward pass, the optimizer in it."""
    node = node_of(optimizer)
    if node["target"] != FUSED_BACKWARD:
        return node
    return stepping((node.get("params") or {}).get("optimizer", "adamw"))


def steps_in_backward(optimizer: OptimizerNode) -> bool:
    """Whether weights are stepped during the backward pass."""
    return node_of(optimizer)["target"] == FUSED_BACKWARD


def build(optimizer: OptimizerNode, groups: list[dict], *, seed: int = 0, fused: bool = True) -> Optimizer:
    """The optimizer of parameter groups, each with its "lr". seed: for those that take one."""
    node = node_of(optimizer, fused=fused)
    own = node.get("params") or {}
    more = {"seed": seed} if takes(node, "seed") and "seed" not in own else {}
    with redirect_stdout(io.StringIO()):  # Prodigy prints its params
        return instantiate(node, params=groups, **more)


def weights_dtype(optimizer: OptimizerNode) -> torch.dtype | None:
    """Dtype of the weights that an optimizer is for, as its class says; None: any."""
    target = stepping(optimizer)["target"]
    return None if package_of(target) in OPTIONAL else getattr(get_class(target), "weights_dtype", None)


def package_of(target: str) -> str:
    """The package that a target is imported from."""
    return target.partition(".")[0]


def averages_weights(optimizer: OptimizerNode) -> bool:
    """Whether an optimizer keeps an average of the weights, which is then what is evaluated (schedule-free).

    It has `train()` and `eval()`, which put the weights that are trained, and the average, into the module.
    """
    if stepping(optimizer)["target"].startswith("bitsandbytes."):
        return False
    return all(callable(getattr(kind_of(optimizer), mode, None)) for mode in ("train", "eval"))


def optimizer_of(module: Any) -> OptimizerNode:
    """The optimizer of a module; one that names none has torch's AdamW."""
    return getattr(module, "optimizer", "adamw")


def kind_of(optimizer: OptimizerNode) -> type[Optimizer]:
    """The class of what steps the weights."""
    return get_class(stepping(optimizer)["target"])
