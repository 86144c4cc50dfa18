"""Classifier-free guidance (Ho & Salimans 2022): a predict with context becomes a predict without."""

from collections.abc import Callable

import torch
from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]  # x [B, C, h, w], t [B] -> eps [B, C, h, w]
ConditionalPredict = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, t, context [B, M, D] -> eps


def classifier_free_guidance(
    predict: ConditionalPredict,
    context: Tensor,
    unconditional: Tensor,
    guidance_scale: float,
    *,
    batched: bool = True,
) -> Predict:
    """eps_uncond + guidance_scale * (eps_cond - eps_uncond), in the parametrisation of Stable Diffusion.

    context: [B, M, D]; unconditional: [B, M, D] or [1, M, D]. Scale 1 is the conditional prediction alone.
    `batched` sends [uncond, cond] through the network as one batch; otherwise two passes, half the memory.
    """
    if guidance_scale == 1:
        return lambda x, t: predict(x, t, context)
    unconditional = unconditional.expand_as(context)
    both = torch.cat([unconditional, context])

    def guided(x: Tensor, t: Tensor) -> Tensor:
        if batched:
            eps_uncond, eps_cond = predict(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        else:
            eps_uncond, eps_cond = predict(x, t, unconditional), predict(x, t, context)
        return eps_uncond + guidance_scale * (eps_cond - eps_uncond)

    return guided
