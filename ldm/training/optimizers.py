"""AdamW over parameter groups, and learning-rate schedules."""

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ldm.errors import UserError
from ldm.training.adamw_bf16 import AdamWBF16
from ldm.training.low_memory import StepInBackward

LRSchedule = Literal["constant", "cosine", "wsd"]
OptimizerName = Literal["adamw", "adamw_8bit", "adamw_bf16"]
Parts = Mapping[str, tuple[nn.Module, float]]  # name -> (module, learning rate)
WSD_DECAY = 0.2  # share of a "wsd" run that decays


def adamw(
    parts: Parts,
    *,
    name: OptimizerName = "adamw",
    step_in_backward: bool = False,
    betas: Sequence[float] = (0.9, 0.999),
    weight_decay: float = 0.01,
    fused: bool = True,
    seed: int = 0,
) -> Optimizer:
    """AdamW (Loshchilov and Hutter 2019), one parameter group per part that learns.

    "adamw": float32 states, 8 bytes a weight; `fused` updates all tensors of a group in one pass.
    "adamw_8bit": 2 bytes a weight, bitsandbytes. "adamw_bf16": 4 bytes, for bfloat16 weights; `seed` rounds.
    """
    options = {"betas": tuple(betas), "weight_decay": weight_decay, "eps": 1e-8}

    def make(groups: list[dict]) -> Optimizer:
        if name == "adamw_bf16":
            return AdamWBF16(groups, **options, seed=seed)
        if name == "adamw_8bit":
            import bitsandbytes  # an extra: only here, where it is asked for

            return bitsandbytes.optim.AdamW8bit(groups, **options)
        return AdamW(groups, **options, fused=fused)

    groups = [
        {"name": part, "lr": lr, "params": [p for p in module.parameters() if p.requires_grad]}
        for part, (module, lr) in parts.items()
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = StepInBackward(groups, make) if step_in_backward else make(groups)
    if name != "adamw_8bit":
        optimizer.register_load_state_dict_post_hook(lay_out_states)
    return optimizer


def check_optimizer(
    *,
    name: OptimizerName,
    step_in_backward: bool,
    compiled: bool,
    accumulate: int,
    clip: float | None,
    precision: str | int | None,
    processes: int,
) -> None:
    """Refuses what cannot work together, or is not installed; `clip`, `precision` as a Trainer has them."""
    if name == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        remedy = 'Install it with `pip install -e ".[8bit]"`, or set model.params.optimizer=adamw.'
        raise UserError("8-bit AdamW needs bitsandbytes, which is not installed", remedy=remedy)
    if not step_in_backward:
        return
    if compiled:
        remedy = "Set model.params.compile=null, or model.params.step_in_backward=false."
        what = "A compiled backward pass gives all gradients at its end, so steps in it would save no memory"
        raise UserError(what, where="model.params.compile", remedy=remedy)
    refused = {
        "trainer.accumulate_grad_batches": accumulate > 1,
        "trainer.gradient_clip_val": bool(clip),
        "trainer.precision": str(precision).startswith("16"),
        "trainer.devices": processes > 1,
    }
    for key in (key for key, present in refused.items() if present):
        remedy = f"Take {key} off, or set model.params.step_in_backward=false."
        raise UserError(
            "Steps in the backward pass never see all gradients at once", where=key, remedy=remedy
        )


def lay_out_states(optimizer: torch.optim.Optimizer) -> None:
    """Gives loaded states the memory layout of their parameters.

    The fused kernels walk memory and do not look at strides: a checkpoint written while the weights lay in
    another layout would pair every weight with the moments of another one.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def lr_factor(schedule: LRSchedule, *, warmup_steps: int, max_steps: int) -> Callable[[int], float]:
    """Optimizer step -> factor of the learning rate: linear warm-up, then what the schedule says.

    "constant"; "cosine": half a cosine to 0; "wsd", warmup-stable-decay: constant, then linear to 0 over the
    last fifth of the steps, about as good as a cosine, and a run can be made longer (Hägele et al. 2024).
    """
    if schedule != "constant" and max_steps < 1:
        what = f"The schedule {schedule} ends with the run, whose length is not given"
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


def with_schedule(
    optimizer: torch.optim.Optimizer, schedule: LRSchedule, *, warmup_steps: int, max_steps: int
) -> dict:
    """What `LightningModule.configure_optimizers` returns: the schedule advances with optimizer steps."""
    factor = lr_factor(schedule, warmup_steps=warmup_steps, max_steps=max_steps)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step", "name": "lr"},
    }
