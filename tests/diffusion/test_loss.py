"""The loss: subject and prior means apart, weights on their own items."""

import pytest
import torch

from ldm.diffusion.loss import dreambooth_loss, min_snr_weights, mse_per_item
from ldm.diffusion.process import DiscreteDiffusion
from ldm.diffusion.schedule import make_alphas_cumprod

ALPHAS = make_alphas_cumprod()
EPS = DiscreteDiffusion(ALPHAS)


def test_mse_keeps_items_apart_and_in_float32():
    prediction = torch.tensor([[[1.0, 3.0]], [[0.0, 0.0]]], dtype=torch.bfloat16)
    target = torch.tensor([[[0.0, 0.0]], [[0.0, 2.0]]], dtype=torch.bfloat16)
    losses = mse_per_item(prediction, target)
    assert losses.tolist() == [5.0, 2.0] and losses.dtype == torch.float32


def test_mse_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(1, 4\)"):
        mse_per_item(torch.zeros(2, 4), torch.zeros(1, 4))


def test_total_is_subject_mean_plus_weighted_prior_mean():
    per_item, is_prior = torch.tensor([1.0, 3.0, 10.0, 20.0, 30.0]), torch.tensor([0, 0, 1, 1, 1]).bool()
    loss = dreambooth_loss(per_item, is_prior, 0.5)
    assert (loss.subject.item(), loss.prior.item(), loss.total.item()) == (2.0, 20.0, 12.0)
    shuffled = torch.tensor([2, 0, 4, 1, 3])
    assert dreambooth_loss(per_item[shuffled], is_prior[shuffled], 0.5).total.item() == 12.0


@pytest.mark.parametrize("prior", [False, True])
def test_a_part_without_items_is_zero(prior):
    loss = dreambooth_loss(torch.tensor([2.0, 4.0]), torch.full((2,), prior), 0.5)
    assert (loss.subject.item(), loss.prior.item()) == ((0.0, 3.0) if prior else (3.0, 0.0))
    assert loss.total.item() == (1.5 if prior else 3.0)


def test_a_broken_item_of_one_part_leaves_the_other_parts_gradient_alone():
    per_item = torch.tensor([1.0, 2.0], requires_grad=True)
    dreambooth_loss(per_item, torch.tensor([False, True]), 0.25).total.backward()
    assert per_item.grad.tolist() == [1.0, 0.25]
    loss = dreambooth_loss(torch.tensor([1.0, float("inf")]), torch.tensor([False, True]), 1.0)
    assert loss.subject.item() == 1.0 and loss.prior.isinf()


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


def test_weights_meet_their_own_items():
    """Subject items at one timestep, prior at another: each half carries the weight of its own."""
    timesteps, is_prior = torch.tensor([10, 10, 999, 999]), torch.tensor([False, False, True, True])
    weights = min_snr_weights(EPS, timesteps, gamma=5.0)
    loss = dreambooth_loss(weights * torch.ones(4), is_prior, 1.0)
    assert loss.subject.item() == pytest.approx(weights[0].item()) and loss.prior.item() == 1.0


def test_a_floor_adds_that_share_of_the_error_in_x0():
    """floor / SNR times the error in eps is floor times the error in x0, whatever the network predicts."""
    timesteps = torch.tensor([5, 400, 999])
    ratio = ALPHAS[timesteps] / (1 - ALPHAS[timesteps])
    for parameterization, per_x0 in (("eps", ratio), ("v", ratio + 1), ("x0", torch.ones(3))):
        process = DiscreteDiffusion(ALPHAS, parameterization=parameterization)
        plain = min_snr_weights(process, timesteps, gamma=5.0)
        raised = min_snr_weights(process, timesteps, gamma=5.0, floor=0.1)
        torch.testing.assert_close((raised - plain) * per_x0, torch.full((3,), 0.1))
