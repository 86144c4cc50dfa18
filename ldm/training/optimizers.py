"""AdamW over parameter groups, and learning-rate schedules."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

LRSchedule = Literal["constant", "cosine"]


def adamw(
    parts: Mapping[str, tuple[nn.Module, float]],
    *,
    betas: Sequence[float] = (0.9, 0.999),
    weight_decay: float = 0.01,
    eps: float = 1e-8,
    fused: bool = True,
) -> AdamW:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2), one group per part: name -> (module, learning rate).

    Frozen parameters are left out. `fused` updates all tensors of a group in one pass.
    """
    groups = [
        {"name": name, "lr": lr, "params": [p for p in module.parameters() if p.requires_grad]}
        for name, (module, lr) in parts.items()
    ]
    optimizer = AdamW(
        [group for group in groups if group["params"]],
        betas=tuple(betas),
        weight_decay=weight_decay,
        eps=eps,
        fused=fused,
    )
    optimizer.register_load_state_dict_post_hook(lay_out_states)
    return optimizer


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
    """Optimizer step -> factor of the learning rate: linear warm-up, then constant or half a cosine to 0."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if schedule == "constant":
            return 1.0
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
