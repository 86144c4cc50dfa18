"""The schedule against its published numbers, and every conversion against its inverse."""

import pytest
import torch

from ldm.diffusion.schedule import (
    PARAMETERIZATIONS,
    add_noise,
    make_alphas_cumprod,
    snr,
    to_eps,
    to_x0,
    training_target,
)
from ldm.errors import UserError

ALPHAS = make_alphas_cumprod()
TIMESTEPS = torch.tensor([0, 1, 250, 499, 998, 999])


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """x0 and noise, [6, 4, 3, 5] float32."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(6, 4, 3, 5, generator=draw), torch.randn(6, 4, 3, 5, generator=draw)


def test_stable_diffusions_own_numbers():
    assert ALPHAS.shape == (1000,) and ALPHAS.dtype == torch.float32
    known = {0: 0.99915, 1: 0.9982960, 499: 0.2776697, 999: 0.0046601}
    for t, value in known.items():
        assert ALPHAS[t].item() == pytest.approx(value, abs=1e-7)


def test_linear_betas_differ_from_scaled_ones_only_between_their_ends():
    linear = make_alphas_cumprod(beta_schedule="linear", linear_start=1e-4, linear_end=0.02)
    assert linear[0].item() == pytest.approx(1 - 1e-4)
    assert 1 - (linear[-1] / linear[-2]).item() == pytest.approx(0.02, rel=1e-3)
    assert linear[500] < make_alphas_cumprod(linear_start=1e-4, linear_end=0.02)[500]


def test_timesteps_sets_the_length():
    short = make_alphas_cumprod(timesteps=10)
    assert short.shape == (10,) and short[0].item() == pytest.approx(0.99915)


def test_noisy_latents_keep_unit_variance_and_their_own_timestep(pair):
    x0, noise = pair
    noisy = add_noise(x0, noise, TIMESTEPS, ALPHAS)
    for i, t in enumerate(TIMESTEPS):
        a, s = ALPHAS[t].double().sqrt(), (1 - ALPHAS[t].double()).sqrt()
        torch.testing.assert_close(noisy[i].double(), a * x0[i].double() + s * noise[i].double())


def test_coefficients_stay_float32_for_bfloat16_latents():
    """At t = 0 and 1 bfloat16 coefficients would be equal: sqrt(0.99915) and sqrt(0.9983) both round to 1."""
    x0, noise = torch.zeros(2, 1, 1, 1, dtype=torch.bfloat16), torch.ones(2, 1, 1, 1, dtype=torch.bfloat16)
    noisy = add_noise(x0, noise, torch.tensor([0, 1]), ALPHAS)
    assert noisy.dtype == torch.bfloat16
    expected = (1 - ALPHAS[:2]).sqrt().to(torch.bfloat16)
    assert torch.equal(noisy.flatten(), expected) and noisy[0] != noisy[1]


def test_snr_is_signal_over_noise_variance():
    torch.testing.assert_close(snr(TIMESTEPS, ALPHAS), ALPHAS[TIMESTEPS] / (1 - ALPHAS[TIMESTEPS]))
    assert snr(torch.tensor([0]), ALPHAS).item() == pytest.approx(0.99915 / 0.00085, rel=1e-3)


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_a_perfect_prediction_gives_back_noise_and_latent(parameterization, pair):
    x0, noise = (tensor.double() for tensor in pair)
    x_t = add_noise(x0, noise, TIMESTEPS, ALPHAS)
    perfect = training_target(parameterization, x0, noise, TIMESTEPS, ALPHAS)
    eps = to_eps(parameterization, perfect, x_t, TIMESTEPS, ALPHAS)
    x0_again = to_x0(parameterization, perfect, x_t, TIMESTEPS, ALPHAS)
    torch.testing.assert_close(eps, noise, atol=3e-5, rtol=1e-4)  # x0 -> eps divides by 0.029 at t = 0
    torch.testing.assert_close(x0_again, x0, atol=3e-5, rtol=1e-4)  # eps -> x0 divides by 0.068 at t = 999


@pytest.mark.parametrize("parameterization", ["v", "x0"])
def test_a_neighbouring_timestep_would_be_seen(parameterization, pair):
    x0, noise = pair
    t = torch.full((6,), 500)
    perfect, x_t = training_target(parameterization, x0, noise, t, ALPHAS), add_noise(x0, noise, t, ALPHAS)
    assert (to_eps(parameterization, perfect, x_t, t + 1, ALPHAS) - noise).abs().max() > 1e-3


def test_v_is_the_tangent_of_the_noising_circle(pair):
    """v is orthogonal to x_t where x0 and noise are: v = a eps - s x0 (Salimans & Ho 2022)."""
    x0 = torch.zeros(6, 2)
    noise = torch.zeros(6, 2)
    x0[:, 0], noise[:, 1] = 1, 1
    v, x_t = training_target("v", x0, noise, TIMESTEPS, ALPHAS), add_noise(x0, noise, TIMESTEPS, ALPHAS)
    torch.testing.assert_close((v * x_t).sum(1), torch.zeros(6), atol=1e-6, rtol=0)
    torch.testing.assert_close(v[:, 1], ALPHAS[TIMESTEPS].sqrt())


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_dtypes_follow_the_latents(parameterization, pair):
    x0, noise = (tensor.bfloat16() for tensor in pair)
    target = training_target(parameterization, x0, noise.float(), TIMESTEPS, ALPHAS)
    assert target.dtype == torch.bfloat16
    assert to_eps(parameterization, target, x0.float(), TIMESTEPS, ALPHAS).dtype == torch.bfloat16
    assert to_x0(parameterization, target, x0.float(), TIMESTEPS, ALPHAS).dtype == torch.bfloat16


def test_unknown_names_are_answered_with_the_valid_ones(pair):
    with pytest.raises(UserError, match="epsilon.*eps, v, x0"):
        training_target("epsilon", *pair, TIMESTEPS, ALPHAS)
    with pytest.raises(UserError, match="cosine.*scaled_linear, linear"):
        make_alphas_cumprod(beta_schedule="cosine")
