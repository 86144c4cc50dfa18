"""Optimizers for small memory: steps taken during the backward pass, and AdamW on bfloat16 weights alone."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ldm import randomness

Group = dict[str, Any]  # "params", "lr", "name"


class StepInBackward(Optimizer):
    """Steps each parameter as soon as its gradient is there, then frees it: no gradients are kept.

    The result is that of stepping afterwards. It rules out all that needs every gradient at once: clipping,
    accumulation, a loss scaler, averaging over processes. State dicts are those of `make`'s optimizer.

    groups: parameter groups, each with its "lr". make: groups -> an optimizer, called once per parameter.
    """

    def __init__(self, groups: Iterable[Group], make: Callable[[list[Group]], Optimizer]):
        groups = [dict(group, params=list(group["params"])) for group in groups]
        self._alone = {p: make([{**group, "params": [p]}]) for group in groups for p in group["params"]}
        defaults = next(iter(self._alone.values())).defaults
        super().__init__(groups, defaults)
        self._group_of = {p: i for i, group in enumerate(groups) for p in group["params"]}
        for parameter in self._alone:
            parameter.register_post_accumulate_grad_hook(self._step_one)

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """The work is done when the backward pass is: `closure` holds it, if there is one."""
        return None if closure is None else torch.enable_grad()(closure)()

    def _step_one(self, parameter: Tensor) -> None:
        alone = self._alone[parameter]
        group = self.param_groups[self._group_of[parameter]]
        alone.param_groups[0].update({key: value for key, value in group.items() if key != "params"})
        alone.state = self.state  # so that saving and loading this optimizer does so for all of them
        alone.step()
        parameter.grad = None


class AdamWBF16(Optimizer):
    """AdamW whose weights and moments are bfloat16: 6 bytes a weight, and 2 more for its gradient.

    Each update is computed in float32 and written with stochastic rounding. Rounding to the nearest would
    lose every update below 1/512 of a weight: at learning rates of fine-tuning, nearly all of them.

    groups: parameter groups, each with its "lr". seed: of the rounding, which is drawn anew at each step.
    """

    def __init__(
        self,
        groups: Iterable[Group],
        *,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        seed: int = 0,
    ):
        super().__init__(groups, {"betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self.seed = seed

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None if closure is None else torch.enable_grad()(closure)()
        first = self.param_groups[0]["params"][0]
        done = self.state[first]["step"] if first in self.state else 0
        seed = randomness.generator(self.seed, done, "rounding").initial_seed()
        draws = torch.Generator(first.device).manual_seed(seed)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, draws)
        return loss

    def _update(self, parameter: Tensor, group: Group, draws: torch.Generator) -> None:
        """Loshchilov and Hutter 2019, algorithm 2."""
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        (beta1, beta2), lr, t = group["betas"], group["lr"], state["step"]
        gradient = parameter.grad.float()
        mean = state["exp_avg"].float().lerp_(gradient, 1 - beta1)
        square = state["exp_avg_sq"].float().lerp_(gradient.square(), 1 - beta2)
        weight = parameter.float().mul_(1 - lr * group["weight_decay"])
        scale = (square / (1 - beta2**t)).sqrt_().add_(group["eps"])
        weight.addcdiv_(mean, scale, value=-lr / (1 - beta1**t))
        for kept, exact in ((state["exp_avg"], mean), (state["exp_avg_sq"], square), (parameter, weight)):
            round_into(kept, exact, draws)


def round_into(target: Tensor, exact: Tensor, draws: torch.Generator) -> None:
    """Writes float32 values into a bfloat16 tensor, each to one of its two neighbours, right on average.

    bfloat16 is the upper half of a float32: a uniform integer added to the lower half carries into the upper
    with the probability that the lower half says. Targets of another dtype are filled as usual.
    """
    if target.dtype != torch.bfloat16:
        target.copy_(exact)
        return
    bits = exact.view(torch.int32)
    carry = torch.empty_like(bits).random_(0, 1 << 16, generator=draws)
    target.copy_(((bits + carry) & -(1 << 16)).view(torch.float32))
