"""Gradient norm, computed once a step, gradient clipping, and freeing of gradients."""

from weakref import WeakKeyDictionary

import pytorch_lightning as pl
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from ldm.optim.adamw_bf16 import AdamWBF16

EPSILON = 1e-6  # added to the norm, as torch.nn.utils.clip_grad_norm_ does

_newest: WeakKeyDictionary[Optimizer, tuple[int, Tensor]] = WeakKeyDictionary()  # micro-batch, norm


def gradient_norm(trainer: pl.Trainer, optimizer: Optimizer) -> Tensor | None:
    """2-norm of the gradient before clipping -> scalar, the same in every process.

    None if there are no gradients, because of a fused backward pass.
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
    gradient_clip_val: float | None = None,
    gradient_clip_algorithm: str | None = None,
) -> None:
    """Gradient clipping by value or by norm, as a module's `configure_gradient_clipping`.

    By norm (Pascanu et al. 2013) a fused optimizer divides the gradients itself: `grad_scale` is exactly 1
    for a step that is not clipped.
    """
    if not gradient_clip_val:
        return
    if gradient_clip_algorithm == "value":
        clip_grad_value_(_parameters(optimizer), gradient_clip_val)
        return
    norm = gradient_norm(module.trainer, optimizer)
    if norm is None:
        return
    if _divides(optimizer):
        # float32 for bfloat16 gradients too: the kernels take no other
        optimizer.grad_scale = ((norm.float() + EPSILON) / gradient_clip_val).clamp(min=1.0)
    else:
        clip_grads_with_norm_(_parameters(optimizer), gradient_clip_val, norm)


class FreeGradients(pl.Callback):
    """Frees the gradients after the optimizer's step; Lightning keeps them through the next forward pass.

    It should be the first callback, so that the others have that memory.
    """

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: object, batch: dict, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            for optimizer in trainer.optimizers:
                optimizer.zero_grad(set_to_none=True)


def _divides(optimizer: Optimizer) -> bool:
    """Whether it divides gradients by its `grad_scale`: torch's fused ones do, but not under FSDP."""
    able = isinstance(optimizer, AdamWBF16) or getattr(optimizer, "_step_supports_amp_scaling", False)
    return able and not isinstance(_parameters(optimizer)[0], DTensor)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
