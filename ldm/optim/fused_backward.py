"""Fused backward pass: an optimizer that steps during the backward pass and frees gradients."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from ldm.annotations import Seed
from ldm.optim.adamw_bf16 import Group
from ldm.optim.optimizer_nodes import OptimizerNode, build

PASSES = 32  # optimizer calls in a backward pass


class FusedBackward(Optimizer):
    """Fused backward pass: steps parameters during the backward pass, and frees their gradients.

    The result equals that of a step afterwards. Whatever needs all gradients at once is impossible: clipping,
    accumulation, a loss scaler, averaging over processes. State dicts are those of `optimizer`.
    Parameters are stepped in groups, of `1 / PASSES` of all gradients each: an optimizer call for each
    parameter would take longer than the arithmetic of the update.

    params: parameter groups, each with its "lr".
    optimizer: what steps them, a name or a node.
    seed: of its stochastic rounding.
    """

    def __init__(self, params: Iterable[Group], *, optimizer: OptimizerNode = "adamw", seed: Seed = 0):
        groups = [dict(group, params=list(group["params"])) for group in params]
        self.inner = build(optimizer, groups, seed=seed)
        super().__init__(groups, self.inner.defaults)
        self._group_of = {p: i for i, group in enumerate(groups) for p in group["params"]}
        self._room = pending_gradient_bytes(self._group_of)
        self._waiting: list[Tensor] = []
        self._held = 0  # bytes
        for parameter in self._group_of:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Only calls `closure`, which contains the backward pass: the parameters are stepped in there."""
        return None if closure is None else torch.enable_grad()(closure)()

    def _arrived(self, parameter: Tensor) -> None:
        if not self._waiting:  # autograd calls back at the end of the pass, for the last parameters
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
        self.inner.param_groups = [group for group in groups if group["params"]]
        self.inner.state = self.state  # so that this optimizer saves and loads all states
        self.inner.step()
        for parameter in self._waiting:
            parameter.grad = None
        self._waiting = []
        self._held = 0


def pending_gradient_bytes(parameters: Iterable[Tensor]) -> int:
    """Most bytes of gradients that are pending at a time, without the one that arrives last."""
    return sum(p.nbytes for p in parameters) // PASSES
