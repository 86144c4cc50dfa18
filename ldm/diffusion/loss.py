"""The DreamBooth loss: per-item losses, weighted, then averaged over subject items and over prior items.

Losses stay unreduced, [B], until the end, so every weight is applied to the loss of its own item.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.process import NoiseProcess


class DreamBoothLoss(NamedTuple):
    """Scalars: `total` = `subject` + prior_loss_weight * `prior`; the mean of no items is 0."""

    total: Tensor
    subject: Tensor
    prior: Tensor


def mse_per_item(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each item, in float32. prediction, target: [B, ...] -> [B]."""
    if prediction.shape != target.shape:
        raise ValueError(f"prediction has shape {tuple(prediction.shape)}, target {tuple(target.shape)}")
    return F.mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(dim=1)


def min_snr_weights(process: NoiseProcess, t: Tensor, *, gamma: float, floor: float = 0.0) -> Tensor:
    """Min-SNR-gamma weights of a mean squared error in the network's own target (Hang et al. 2023, sec. 3.4).

    t: [B] -> [B] float32: min(SNR, gamma) in terms of x0, divided by SNR for eps and SNR + 1 for v.
    floor: added to the weight in terms of x0, so that the noisiest timesteps, which decide the content of an
    image, have weight too. It is not part of the paper.
    """
    return (process.snr(t).clamp(max=gamma) + floor) / process.error_scale(t)


def dreambooth_loss(per_item: Tensor, is_prior: Tensor, prior_loss_weight: float) -> DreamBoothLoss:
    """Subject mean + prior_loss_weight * prior mean (Ruiz et al. 2023, eq. 2).

    per_item: [B] losses, already weighted; is_prior: [B] bool.
    """
    subject = _mean_where(per_item, ~is_prior)
    prior = _mean_where(per_item, is_prior)
    return DreamBoothLoss(subject + prior_loss_weight * prior, subject, prior)


def _mean_where(per_item: Tensor, mask: Tensor) -> Tensor:
    """Mean of the masked items, 0 if there are none; does not wait for the device."""
    return per_item.where(mask, 0).sum() / mask.sum().clamp(min=1)
