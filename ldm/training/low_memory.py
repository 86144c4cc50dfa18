"""Optimizers for small memory: steps taken during the backward pass, and AdamW on bfloat16 weights alone."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ldm import randomness

Group = dict[str, Any]  # "params", "lr", "name"
PASSES = 32  # of the optimizer in a backward pass


class StepInBackward(Optimizer):
    """Steps parameters while the backward pass goes on, some at a time, and frees their gradients.

    The result is that of stepping afterwards. It rules out all that needs every gradient at once: clipping,
    accumulation, a loss scaler, averaging over processes. State dicts are those of `make`'s optimizer.
    At most `1 / PASSES` of all gradients are held, and one more: a step for each would cost more time
    than all of the update's arithmetic.

    groups: parameter groups, each with its "lr". make: groups -> the optimizer that steps.
    """

    def __init__(self, groups: Iterable[Group], make: Callable[[list[Group]], Optimizer]):
        groups = [dict(group, params=list(group["params"])) for group in groups]
        self._inner = make(groups)
        super().__init__(groups, self._inner.defaults)
        self._group_of = {p: i for i, group in enumerate(groups) for p in group["params"]}
        self._room = held_gradients(self._group_of)
        self._waiting: list[Tensor] = []
        self._held = 0  # bytes
        for parameter in self._group_of:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """The work is done when the backward pass is: `closure` holds it, if there is one."""
        return None if closure is None else torch.enable_grad()(closure)()

    def _arrived(self, parameter: Tensor) -> None:
        if not self._waiting:  # autograd calls back when the pass is over, for the last ones
            torch.autograd.Variable._execution_engine.queue_callback(self._step_waiting)
        self._waiting.append(parameter)
        self._held += parameter.grad.nbytes
        if self._held > self._room:
            self._step_waiting()

    def _step_waiting(self) -> None:
        if not self._waiting:
            return
        groups = [{**group, "params": []} for group in self.param_groups]
        for parameter in self._waiting:
            groups[self._group_of[parameter]]["params"].append(parameter)
        self._inner.param_groups = [group for group in groups if group["params"]]
        self._inner.state = self.state  # so that saving and loading this optimizer does so for all of them
        self._inner.step()
        for parameter in self._waiting:
            parameter.grad = None
        self._waiting, self._held = [], 0


def held_gradients(parameters: Iterable[Tensor]) -> int:
    """Bytes of gradients that wait for their step at most, the one that comes last not counted."""
    return sum(p.nbytes for p in parameters) // PASSES


class AdamWBF16(Optimizer):
    """AdamW whose weights and moments are bfloat16: 6 bytes a weight, and 2 more for its gradient.

    Each update is computed in float32 and written with stochastic rounding. Rounding to the nearest would
    lose every update below 1/512 of a weight: at learning rates of fine-tuning, nearly all of them.

    groups: parameter groups, each with its "lr". seed: of the rounding, which each parameter draws anew at
    each step, whichever others are stepped with it.
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
        everything = (p for group in self.param_groups for p in group["params"])
        self._number = {parameter: i for i, parameter in enumerate(everything)}

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: Group) -> None:
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
        seed = randomness.generator(self.seed, t, f"rounding/{self._number[parameter]}").initial_seed()
        draws = torch.Generator(parameter.device).manual_seed(seed)
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
