"""The arithmetic of a loss: squared errors, weights over timesteps, means over the items of a stream.

Errors stay unreduced until the end, so every weight is applied to the loss of its own item.
"""

import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.process import NoiseProcess


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error in float32, not reduced. prediction, target: [B, ...] -> [B, ...]."""
    if prediction.shape != target.shape:
        raise ValueError(f"prediction has shape {tuple(prediction.shape)}, target {tuple(target.shape)}")
    return F.mse_loss(prediction.float(), target.float(), reduction="none")


def mean_per_item(error: Tensor) -> Tensor:
    """[B, ...] -> [B]."""
    return error.flatten(1).mean(dim=1)


def min_snr_weights(process: NoiseProcess, t: Tensor, *, gamma: float, floor: float = 0.0) -> Tensor:
    """Min-SNR-gamma weights of a mean squared error in the network's own target (Hang et al. 2023, sec. 3.4).

    t: [B] -> [B] float32: min(SNR, gamma) in terms of x0, divided by SNR for eps and SNR + 1 for v.
    floor: added to the weight in terms of x0, so that the noisiest timesteps, which decide the content of an
    image, have weight too. It is not part of the paper.
    """
    return (process.snr(t).clamp(max=gamma) + floor) / process.error_scale(t)


def mean_where(per_item: Tensor, mask: Tensor) -> Tensor:
    """Mean of the masked items [B], 0 if there are none; does not wait for the device."""
    return per_item.where(mask, 0).sum() / mask.sum().clamp(min=1)
