"""An optimizer for small memory: its steps are taken during the backward pass."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from ldm.training.adamw_bf16 import Group

PASSES = 32  # of the optimizer in a backward pass


class FusedBackward(Optimizer):
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
        self._room = pending_gradient_bytes(self._group_of)
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


def pending_gradient_bytes(parameters: Iterable[Tensor]) -> int:
    """Bytes of gradients that wait for their step at most, the one that comes last not counted."""
    return sum(p.nbytes for p in parameters) // PASSES
