"""The arithmetic of the loss: errors by item, means by stream, min-SNR weights."""

import pytest
import torch
from torch import Tensor

from ldm.diffusion.loss import mean_per_item, mean_where, min_snr_weights, squared_error
from ldm.diffusion.process import DiscreteDiffusion
from ldm.diffusion.schedule import make_alphas_cumprod

ALPHAS = make_alphas_cumprod()
EPS = DiscreteDiffusion(ALPHAS)


def mse_per_item(prediction: Tensor, target: Tensor) -> Tensor:
    return mean_per_item(squared_error(prediction, target))


def test_mse_keeps_items_apart_and_in_float32():
    prediction = torch.tensor([[[1.0, 3.0]], [[0.0, 0.0]]], dtype=torch.bfloat16)
    target = torch.tensor([[[0.0, 0.0]], [[0.0, 2.0]]], dtype=torch.bfloat16)
    assert squared_error(prediction, target).tolist() == [[[1.0, 9.0]], [[0.0, 4.0]]]
    losses = mse_per_item(prediction, target)
    assert losses.tolist() == [5.0, 2.0] and losses.dtype == torch.float32


def test_mse_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(1, 4\)"):
        squared_error(torch.zeros(2, 4), torch.zeros(1, 4))


def test_the_mean_of_a_stream_is_that_of_its_items():
    per_item = torch.tensor([1.0, 3.0, 10.0])
    assert mean_where(per_item, torch.tensor([True, True, False])).item() == 2.0
    assert mean_where(per_item, torch.zeros(3, dtype=torch.bool)).item() == 0.0


@pytest.mark.parametrize("parameterization", ["eps", "v", "x0"])
def test_min_snr_weighs_the_same_x0_error_alike_in_every_parameterization(parameterization):
    """weight * error² in the network's own target = min(SNR, gamma) * error² in x0 (Hang et al. 2023)."""
    process = DiscreteDiffusion(ALPHAS, parameterization=parameterization)
    timesteps = torch.tensor([5, 200, 500, 900])
    draw = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(4, 4, 2, 2, generator=draw) for _ in range(2))
    x_t = process.add_noise(x0, noise, timesteps)
    target = process.target(x0, noise, timesteps)
    prediction = target + 0.1
    levels = [process.level(t) for t in timesteps.tolist()]
    x0_again = torch.stack(list(map(process.denoised, prediction.double(), x_t.double(), levels)))
    x0_error = mse_per_item(x0_again, x0)
    weights = min_snr_weights(process, timesteps, gamma=5.0)
    snr = ALPHAS[timesteps] / (1 - ALPHAS[timesteps])
    torch.testing.assert_close(
        weights * mse_per_item(prediction, target), snr.clamp(max=5) * x0_error, rtol=1e-4, atol=0
    )
    assert weights.shape == (4,) and weights.dtype == torch.float32


def test_min_snr_leaves_eps_alone_where_little_signal_is_left():
    weights = min_snr_weights(EPS, torch.tensor([10, 999]), gamma=5.0)
    assert weights[1].item() == 1.0 and weights[0].item() < 0.05


def test_a_floor_adds_that_share_of_the_error_in_x0():
    """floor / SNR times the error in eps is floor times the error in x0, whatever the network predicts."""
    timesteps = torch.tensor([5, 400, 999])
    ratio = ALPHAS[timesteps] / (1 - ALPHAS[timesteps])
    for parameterization, per_x0 in (("eps", ratio), ("v", ratio + 1), ("x0", torch.ones(3))):
        process = DiscreteDiffusion(ALPHAS, parameterization=parameterization)
        plain = min_snr_weights(process, timesteps, gamma=5.0)
        raised = min_snr_weights(process, timesteps, gamma=5.0, floor=0.1)
        torch.testing.assert_close((raised - plain) * per_x0, torch.full((3,), 0.1))
