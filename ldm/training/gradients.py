"""The gradient as a whole, before the optimizer's step: its norm, computed once a step, and clipping."""

from weakref import WeakKeyDictionary

import pytorch_lightning as pl
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

_newest: WeakKeyDictionary[Optimizer, tuple[int, Tensor]] = WeakKeyDictionary()  # micro-batch, norm


def gradient_norm(trainer: pl.Trainer, optimizer: Optimizer) -> Tensor | None:
    """2-norm before clipping -> scalar, the same in every process, split or not.

    None where no gradients are there, because the optimizer stepped in the backward pass.
    """
    gradients = [p.grad for p in _parameters(optimizer) if p.grad is not None]
    if not gradients:
        return None
    batch = trainer.fit_loop.total_batch_idx
    if _newest.get(optimizer, (None,))[0] != batch:
        norm = get_total_norm(gradients)
        _newest[optimizer] = batch, norm.full_tensor() if isinstance(norm, DTensor) else norm
    return _newest[optimizer][1]


def clip(
    module: pl.LightningModule,
    optimizer: Optimizer,
    gradient_clip_val: float | None,
    gradient_clip_algorithm: str | None,
) -> None:
    """As the Trainer asks for; where that is by norm, without computing it again (Pascanu et al. 2013)."""
    if not gradient_clip_val or gradient_clip_algorithm == "value":
        module.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        return
    norm = gradient_norm(module.trainer, optimizer)
    if norm is not None:
        clip_grads_with_norm_(_parameters(optimizer), gradient_clip_val, norm)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
