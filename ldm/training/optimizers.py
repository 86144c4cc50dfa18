"""AdamW over parameter groups, and learning-rate schedules."""

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ldm.errors import UserError
from ldm.training.adamw_bf16 import AdamWBF16
from ldm.training.fused_adamw import FusedAdamW
from ldm.training.fused_backward import FusedBackward

LRSchedule = Literal["constant", "cosine", "wsd"]
OptimizerName = Literal["adamw", "adamw_8bit", "adamw_bf16"]
ParamGroups = Mapping[str, tuple[nn.Module, float]]  # name -> (module, learning rate)
WSD_DECAY = 0.2  # share of the steps of a "wsd" schedule in which the learning rate decays


def adamw(
    param_groups: ParamGroups,
    *,
    name: OptimizerName = "adamw",
    fused_backward: bool = False,
    betas: Sequence[float] = (0.9, 0.999),
    weight_decay: float = 0.01,
    fused: bool = True,
    seed: int = 0,
) -> Optimizer:
    """AdamW (Loshchilov and Hutter 2019), with one parameter group per module that has trainable weights.

    name: "adamw" has float32 states, 8 bytes a weight, `fused` in one kernel; "adamw_8bit" (bitsandbytes) 2
    bytes; "adamw_bf16" 4 bytes, for bfloat16 weights, with `seed` for the stochastic rounding.
    """
    options = {"betas": tuple(betas), "weight_decay": weight_decay, "eps": 1e-8}

    def make(groups: list[dict]) -> Optimizer:
        if name == "adamw_bf16":
            return AdamWBF16(groups, **options, seed=seed)
        if name == "adamw_8bit":
            import bitsandbytes  # an optional dependency

            return bitsandbytes.optim.AdamW8bit(groups, **options)
        return FusedAdamW(groups, **options) if fused else AdamW(groups, **options)

    groups = [
        {"name": group_name, "lr": lr, "params": [p for p in module.parameters() if p.requires_grad]}
        for group_name, (module, lr) in param_groups.items()
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = FusedBackward(groups, make) if fused_backward else make(groups)
    if name != "adamw_8bit":
        optimizer.register_load_state_dict_post_hook(match_state_strides)
    return optimizer


def check_optimizer(
    *,
    name: OptimizerName,
    fused_backward: bool,
    compiled: bool,
    accumulate: int,
    clip: float | None,
    precision: str | int | None,
    processes: int,
) -> None:
    """Raises UserError if the optimizer is not installed, or impossible with these Trainer settings."""
    if name == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        remedy = 'Install it with `pip install -e ".[8bit]"`, or set model.params.optimizer=adamw.'
        raise UserError("8-bit AdamW needs bitsandbytes, which is not installed", remedy=remedy)
    if not fused_backward:
        return
    if compiled:
        remedy = "Set model.params.compile=null, or model.params.fused_backward=false."
        what = "A compiled backward pass gives all gradients at its end, so steps in it would save no memory"
        raise UserError(what, where="model.params.compile", remedy=remedy)
    refused = {
        "trainer.accumulate_grad_batches": accumulate > 1,
        "trainer.gradient_clip_val": bool(clip),
        "trainer.precision": str(precision).startswith("16"),
        "trainer.devices": processes > 1,
    }
    for key in (key for key, present in refused.items() if present):
        remedy = f"Take {key} off, or set model.params.fused_backward=false."
        raise UserError("A fused backward pass never has all gradients at once", where=key, remedy=remedy)


def match_state_strides(optimizer: torch.optim.Optimizer) -> None:
    """Gives loaded optimizer states the strides of their parameters.

    Fused kernels ignore strides: with states from a checkpoint in another memory format they would pair each
    weight with the moments of another one.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def lr_factor(schedule: LRSchedule, *, warmup_steps: int, max_steps: int) -> Callable[[int], float]:
    """Learning-rate schedule, optimizer step -> factor: linear warm-up, then the schedule.

    "constant"; "cosine": half a cosine to 0; "wsd", warmup-stable-decay: constant, then linear to 0 over the
    last fifth of the steps, about as good as a cosine, and a run can be made longer (Hägele et al. 2024).
    """
    if schedule != "constant" and max_steps < 1:
        what = f"The schedule {schedule} needs the length of the run"
        remedy = "Set trainer.max_steps, or model.params.lr_schedule=constant."
        raise UserError(what, where="model.params.lr_schedule", remedy=remedy)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if schedule == "constant":
            return 1.0
        if schedule == "wsd":
            return min(1.0, max(0.0, (max_steps - step) / max(1, round(WSD_DECAY * max_steps))))
        done = (step - warmup_steps) / max(1, max_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return factor


class ConfiguredSchedule(LambdaLR):
    """A learning-rate schedule of which a checkpoint keeps the step alone.

    Learning rates, and whatever else the parameter groups hold (betas, weight decay), are the config's: a
    checkpoint that is loaded into the optimizer before this one brings back the old ones, and they are
    replaced. So are rates of an end that has been moved: the next step has that of the new schedule.
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float]):
        super().__init__(optimizer, factor)
        self.configured = [_options(group) for group in optimizer.param_groups]

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


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a parameter group holds besides its parameters and the rate of the moment."""
    return {key: value for key, value in group.items() if key not in ("params", "lr")}


def with_schedule(
    optimizer: torch.optim.Optimizer, schedule: LRSchedule, *, warmup_steps: int, max_steps: int
) -> dict:
    """The dict for `LightningModule.configure_optimizers`; the schedule advances with optimizer steps."""
    factor = lr_factor(schedule, warmup_steps=warmup_steps, max_steps=max_steps)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {
            "scheduler": ConfiguredSchedule(optimizer, factor),
            "interval": "step",
            "name": "lr",
        },
    }
