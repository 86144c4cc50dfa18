"""AdamW in one kernel, without the copies that torch's makes of gradients in channels-last."""

import torch
from torch import Tensor
from torch.optim import AdamW

from ldm.annotations import Decay, NonNegativeFloat, PositiveFloat


class FusedAdamW(AdamW):
    """torch's fused AdamW (Loshchilov and Hutter 2019), equal to it to the bit.

    Its kernel walks through the memory of weight, gradient and moments side by side, so all have to have the
    same strides. On a CPU it also copies each gradient that is not contiguous, and does not use the copy. So
    there it gets such tensors as flat views of their memory, and gradients in the strides of their weights.

    params: parameter groups, each with its "lr".
    betas: decays of the averages of gradients and of their squares.
    eps: added to the root of the latter.
    weight_decay: decoupled, times the learning rate.
    """

    def __init__(
        self,
        params: list[dict],
        *,
        betas: tuple[Decay, Decay] = (0.9, 0.999),
        eps: PositiveFloat = 1e-8,
        weight_decay: NonNegativeFloat = 0.01,
    ):
        super().__init__(params, betas=tuple(betas), weight_decay=weight_decay, eps=eps, fused=True)

    def _init_group(
        self,
        group: dict,
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        max_exp_avg_sqs: list[Tensor],
        state_steps: list[Tensor],
    ) -> bool:
        """Collects what the kernel is given."""
        has_complex = super()._init_group(
            group, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps
        )
        for k, parameter in enumerate(params):
            if parameter.device.type != "cpu":
                continue
            if grads[k].stride() != parameter.stride():
                grads[k] = torch.empty_like(parameter).copy_(grads[k])
            if not parameter.is_contiguous():
                for tensors in (params, grads, exp_avgs, exp_avg_sqs):
                    tensors[k] = tensors[k].as_strided((parameter.numel(),), (1,))
        return has_complex
