"""Lion: steps by the sign of a moving average of gradients."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from ldm.annotations import Decay, NonNegativeFloat
from ldm.optim.adamw_bf16 import Group


class Lion(Optimizer):
    """Lion (Chen et al. 2023, 2302.06675, algorithm 2): one moment a weight, and steps of equal size.

    A third to a tenth of AdamW's learning rate suits it, with as many times the weight decay (their sec. 5).

    params: parameter groups, each with its "lr".
    betas: share of the average in a step's direction, and decay of the average.
    weight_decay: decoupled, times the learning rate.
    """

    def __init__(
        self,
        params: Iterable[Group],
        *,
        betas: tuple[Decay, Decay] = (0.9, 0.99),
        weight_decay: NonNegativeFloat = 0.0,
    ):
        super().__init__(params, {"betas": tuple(betas), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            gradients = [p.grad for p in weights]
            for p in weights:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            averages = [self.state[p]["exp_avg"] for p in weights]
            direction = torch._foreach_lerp(averages, gradients, 1 - group["betas"][0])
            torch._foreach_sign_(direction)
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, direction, alpha=-group["lr"])
            torch._foreach_lerp_(averages, gradients, 1 - group["betas"][1])
        return loss
