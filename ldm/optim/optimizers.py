"""Optimizers over parameter groups, what they cannot be combined with, and learning rates over time."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ldm.annotations import Node
from ldm.errors import UserError
from ldm.optim.adamw_bf16 import AdamWBF16
from ldm.optim.fused_backward import FusedBackward
from ldm.optim.optimizer_nodes import (
    SHORT,
    OptimizerNode,
    averages_weights,
    build,
    kind_of,
    package_of,
    stepping,
    steps_in_backward,
)
from ldm.optim.schedules import Constant, LRSchedule
from ldm.schema import TrainerOptions
from ldm.targets import OPTIONAL, parameters_of, spoken_name

ParamGroups = Mapping[str, tuple[nn.Module, float]]  # name -> (module, learning rate)
WHERE = "model.params.optimizer"
TRIED = ("torch.", "ldm.", "prodigyopt.", "schedulefree.")  # optimizers that step on any device
LEAST_FACTOR = 0.01  # of the rate that Prodigy finds; 1 is its authors'


def build_optimizer(
    param_groups: ParamGroups, optimizer: OptimizerNode = "adamw", *, fused: bool = True, seed: int = 0
) -> Optimizer:
    """An optimizer, with one parameter group per module that has trainable weights.

    optimizer: a node, or a name. AdamW (Loshchilov & Hutter 2019): "adamw" has float32 states, 8 bytes a
    weight, `fused` in one kernel; "adamw_8bit" (bitsandbytes) 2 bytes; "adamw_bf16" 4 bytes, for bfloat16
    weights; "adamw_bf16_moments" 4 bytes, for all weights. "adafactor" (Shazeer & Stern 2018) keeps a
    row and a column of second moments, and its learning rate is relative to the root mean square of each
    weight tensor; "lion" (Chen et al. 2023) keeps one moment. "prodigy" (Mishchenko & Defazio 2023) finds the
    rate, of which the learning rate is a factor; "schedule_free" (Defazio et al. 2024) averages in place of a
    schedule. seed: of stochastic rounding.
    """
    groups = [
        {"name": group_name, "lr": lr, "params": [p for p in module.parameters() if p.requires_grad]}
        for group_name, (module, lr) in param_groups.items()
    ]
    groups = [group for group in groups if group["params"]]
    built = build(optimizer, groups, fused=fused, seed=seed)
    if not stepping(optimizer)["target"].startswith("bitsandbytes."):
        if getattr(kind_of(optimizer), "moments_dtype", None) is not None:
            built.register_load_state_dict_pre_hook(keep_state_dtypes)
        built.register_load_state_dict_post_hook(match_states)
    return built


def rounds_stochastically(optimizer: OptimizerNode) -> bool:
    """Whether an optimizer writes bfloat16 weights so that no update is lost, on average."""
    may_be_absent = stepping(optimizer)["target"].startswith("bitsandbytes.")
    return not may_be_absent and issubclass(kind_of(optimizer), AdamWBF16)


def check_optimizer(
    optimizer: OptimizerNode,
    trainer: TrainerOptions,
    *,
    compiled: bool = False,
    processes: int = 1,
    rates: Sequence[float] = (1e-3, 1e-3),
) -> None:
    """Raises UserError if the optimizer cannot be built, or not be used with these Trainer settings.

    rates: learning rates of the parameter groups, as far as there are any.
    """
    node = stepping(optimizer)
    package = package_of(node["target"])
    if package in OPTIONAL and importlib.util.find_spec(package) is None:
        remedy = f'Install it with `pip install -e ".[{OPTIONAL[package]}]"`, or set {WHERE}=adamw.'
        what = f"{spoken_name(node)} needs {package}, which is not installed"
        raise UserError(what, where=WHERE, remedy=remedy)
    if "lr" in (node.get("params") or {}):
        remedy = "Take it off, and set model.params.trainable.learning_rate."
        raise UserError("The learning rates are the model's", where=f"{WHERE}.params.lr", remedy=remedy)
    depends_on_all = package != "bitsandbytes" and _try(node, rates or [1e-3])
    if package == "prodigyopt" and 0 < max(rates, default=0) < LEAST_FACTOR:
        what = f"Prodigy finds the learning rate, and {max(rates)} of it is next to nothing"
        remedy = "Set model.params.trainable.learning_rate=1."
        raise UserError(what, where="model.params.trainable.learning_rate", remedy=remedy)
    if steps_in_backward(optimizer):
        _check_fused_backward(trainer, compiled=compiled, processes=processes)
        if depends_on_all:
            what = (
                f"A step of {node['target']} depends on all gradients, which a fused backward pass never has"
            )
            raise UserError(what, where=WHERE, remedy=f"Set {WHERE} to it alone.")
    elif optimizer != "adamw" and trainer.precision == "16-mixed" and _unscales(node):
        what = f"16-mixed scales gradients, and {spoken_name(node)} would not see them as they are clipped"
        raise UserError(what, where=WHERE, remedy=f"Set {WHERE}=adamw, which is torch's own there.")


def _unscales(node: Node) -> bool:
    """Whether an optimizer divides the gradients by the loss scale itself, after they are clipped."""
    return node["target"] == SHORT["adamw"] or bool((node.get("params") or {}).get("fused"))


def _try(node: Node, rates: Sequence[float]) -> bool:
    """Whether a step changes what all weights of a group share: an estimate of Prodigy's, a count.

    Raises UserError if the optimizer does not take these params, or weights in groups of these rates. Those
    that are known make a step on one weight of each; others may be for a GPU alone.
    """
    weights = [nn.Parameter(torch.ones(2, 2)) for _ in rates]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    try:
        optimizer = build(
            node, [{"params": [weight], "lr": rate} for weight, rate in zip(weights, rates, strict=True)]
        )
        before = [_shared(group) for group in optimizer.param_groups]
        if averages_weights(node):
            optimizer.train()
        if node["target"].startswith(TRIED):
            optimizer.step()
        return before != [_shared(group) for group in optimizer.param_groups]
    except UserError:
        raise
    except Exception as error:  # of any kind, by whoever wrote the class
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = f"{node['target']} does not train this model: {reason}"
        raise UserError(what, where=WHERE, remedy="Set its params, or name another one.") from error


def _shared(group: Mapping[str, Any]) -> dict[str, Any]:
    """What of a parameter group concerns all of its weights."""
    return {key: value for key, value in group.items() if key != "params"}


def _check_fused_backward(trainer: TrainerOptions, *, compiled: bool, processes: int) -> None:
    if compiled:
        remedy = f"Set model.params.compile=null, or {WHERE}=adamw."
        what = "A compiled backward pass gives all gradients at its end, so steps in it would save no memory"
        raise UserError(what, where="model.params.compile", remedy=remedy)
    refused = {
        "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches > 1,
        "trainer.gradient_clip_val": bool(trainer.gradient_clip_val),
        "trainer.precision": str(trainer.precision).startswith("16"),
        "trainer.devices": processes > 1,
    }
    for key in (key for key, present in refused.items() if present):
        remedy = f"Take {key} off, or set {WHERE}=adamw."
        raise UserError("A fused backward pass never has all gradients at once", where=key, remedy=remedy)


@dataclass(frozen=True)
class Saved:
    """A state as a checkpoint has it, which `load_state_dict` leaves alone: it casts tensors."""

    tensor: Tensor


def keep_state_dtypes(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Hides loaded states from torch, which would cast them to the dtype of their weight."""

    states = {
        key: {name: Saved(value) if torch.is_tensor(value) else value for name, value in state.items()}
        for key, state in state_dict["state"].items()
    }
    return state_dict | {"state": states}


def match_states(optimizer: torch.optim.Optimizer) -> None:
    """Gives loaded states the device and the strides of their parameters, and the dtype that they had.

    Fused kernels ignore strides: with states from a checkpoint in another memory format they would pair each
    weight with the moments of another one.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            tensor = value.tensor if isinstance(value, Saved) else value
            if torch.is_tensor(tensor) and tensor.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)


def lr_factor(schedule: LRSchedule, *, max_steps: int) -> Callable[[int], float]:
    """Optimizer step -> factor of the learning rates. Raises UserError for a schedule of an endless run."""
    if max_steps < 1 and type(schedule) is not Constant:
        what = "A schedule of the learning rate needs the length of the run"
        remedy = "Set trainer.max_steps, or model.params.lr_schedule=constant."
        raise UserError(what, where="model.params.lr_schedule", remedy=remedy)
    return lambda step: schedule(step, max_steps)


class ConfiguredSchedule(LambdaLR):
    """A learning-rate schedule of which a checkpoint keeps the step alone.

    Learning rates, and the other parameters of the optimizer (betas, weight decay), are the config's: a
    checkpoint that is loaded into the optimizer before this one brings back the old ones, and they are
    replaced. So are rates of an end that has been moved: the next step has that of the new schedule.
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float]):
        super().__init__(optimizer, factor)
        self.configured = [_options(optimizer, group) for group in optimizer.param_groups]

    def state_dict(self) -> dict:
        return {key: value for key, value in super().state_dict().items() if key != "configured"}

    def load_state_dict(self, state_dict: dict) -> None:
        rates = self.base_lrs
        super().load_state_dict(state_dict)
        self.base_lrs = rates
        groups = zip(self.optimizer.param_groups, self.configured, self._rates(), strict=True)
        for group, options, lr in groups:
            group |= options | {"lr": lr}
        self._last_lr = self._rates()

    def _rates(self) -> list[float]:
        """The rate of each group at this step."""
        rates = zip(self.base_lrs, self.lr_lambdas, strict=True)
        return [rate * factor(self.last_epoch) for rate, factor in rates]


def _options(optimizer: Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """What of a parameter group a config gives, besides the rate; the rest may change with the steps."""
    stepping_one = optimizer.inner if isinstance(optimizer, FusedBackward) else optimizer
    given = parameters_of(type(stepping_one)).keys() - {"params", "lr"}
    return {key: value for key, value in group.items() if key in given}


def with_schedule(optimizer: Optimizer, schedule: LRSchedule, *, max_steps: int) -> dict:
    """The dict for `LightningModule.configure_optimizers`; the schedule advances with optimizer steps."""
    factor = lr_factor(schedule, max_steps=max_steps)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {
            "scheduler": ConfiguredSchedule(optimizer, factor),
            "interval": "step",
            "name": "lr",
        },
    }
