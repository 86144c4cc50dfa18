"""Samplers where the end is known in closed form: a single point, and Gaussian data."""

import math
from typing import get_args

import pytest
import torch

from ldm.diffusion.samplers import (
    SAMPLERS,
    SPACINGS,
    SamplerName,
    ddim,
    dpm_solver_pp_2m,
    plms,
    sampling_timesteps,
)
from ldm.diffusion.schedule import make_alphas_cumprod
from ldm.errors import UserError

ALPHAS = make_alphas_cumprod()


def toward(x0: torch.Tensor):
    """The perfect prediction when all data is `x0`."""

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha = ALPHAS[t].reshape(-1, 1, 1, 1)
        return (x - alpha.sqrt() * x0) / (1 - alpha).sqrt()

    return predict


def gaussian(std: float):
    """The perfect prediction when data is N(0, std²): linear in x."""

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha = ALPHAS.double()[t].reshape(-1, 1, 1, 1)
        return (1 - alpha).sqrt() * x / (alpha * std**2 + 1 - alpha)

    return predict


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_are_exactly_as_many_as_asked_for_and_valid(spacing):
    for steps in (1, 2, 3, 9, 15, 27, 30, 37, 50, 64, 101, 251, 333, 501, 999, 1000):
        timesteps = sampling_timesteps(steps, spacing=spacing)
        assert len(timesteps) == steps and timesteps.dtype == torch.int64
        assert timesteps.min() >= 0 and timesteps.max() <= 999 and (timesteps.diff() <= 0).all()


def test_timesteps_are_stable_diffusions():
    assert sampling_timesteps(50).tolist() == list(range(981, 0, -20))
    assert sampling_timesteps(4, spacing="trailing").tolist() == [999, 749, 499, 249]
    assert sampling_timesteps(4, spacing="linspace").tolist() == [999, 666, 333, 0]
    assert sampling_timesteps(5, T=10).tolist() == [9, 7, 5, 3, 1]


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(steps):
    with pytest.raises(UserError, match="1 to 1000"):
        sampling_timesteps(steps)
    with pytest.raises(UserError, match="leading, trailing, linspace"):
        sampling_timesteps(5, spacing="quad")


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_single_point_is_reached_in_any_number_of_steps(sampler, steps):
    """x ends at the noise level of alphas_cumprod[0], on the line from x0 through its noise."""
    draw = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(2, 4, 3, 3, generator=draw) for _ in range(2))
    timesteps = sampling_timesteps(steps)
    start = ALPHAS[timesteps[0]]
    x = sampler(toward(x0), start.sqrt() * x0 + (1 - start).sqrt() * noise, timesteps, ALPHAS)
    torch.testing.assert_close(x, ALPHAS[0].sqrt() * x0 + (1 - ALPHAS[0]).sqrt() * noise, atol=2e-5, rtol=0)


def gaussian_error(sampler, steps: int, std: float = 0.3) -> float:
    """Relative to the exact flow, which scales x by the ratio of standard deviations of both noise levels."""
    x, timesteps = torch.ones(1, 1, 1, 1, dtype=torch.float64), sampling_timesteps(steps)
    first, last = (a * std**2 + 1 - a for a in (ALPHAS[timesteps[0]].item(), ALPHAS[0].item()))
    return abs(sampler(gaussian(std), x, timesteps, ALPHAS).item() / math.sqrt(last / first) - 1)


def test_ddim_converges_to_the_flow_with_order_one_and_plms_is_ahead():
    ddim_errors = [gaussian_error(ddim, steps) for steps in (50, 100, 200)]
    assert ddim_errors[0] < 0.08
    assert all(1.8 < a / b < 2 for a, b in zip(ddim_errors, ddim_errors[1:], strict=False))
    assert gaussian_error(plms, 50) < ddim_errors[0] / 10


def test_dpm_solver_pp_converges_with_order_two():
    """Where data is as wide as the noise: narrower data moves at small t alone, which few steps reach."""
    errors = [gaussian_error(dpm_solver_pp_2m, steps, std=1.0) for steps in (25, 50, 100, 200)]
    assert errors[1] < gaussian_error(ddim, 50, std=1.0) / 2
    assert all(2.8 < a / b < 4.5 for a, b in zip(errors, errors[1:], strict=False))


def test_two_steps_of_dpm_solver_pp_are_its_algorithm_by_hand():
    """Three steps, of which the one in the middle extrapolates the data by the ratio of its log-SNR steps."""
    timesteps, x = sampling_timesteps(3), torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64)
    levels = [ALPHAS[t].item() for t in (*timesteps, 0)]
    lambdas = [0.5 * math.log(alpha / (1 - alpha)) for alpha in levels]
    x0s, want = [], x.item()
    for i in range(3):
        a, s = math.sqrt(levels[i]), math.sqrt(1 - levels[i])
        a_next, s_next = math.sqrt(levels[i + 1]), math.sqrt(1 - levels[i + 1])
        eps = gaussian(0.3)(torch.full_like(x, want), timesteps[i : i + 1]).item()
        x0s.append((want - s * eps) / a)
        r = (lambdas[1] - lambdas[0]) / (lambdas[2] - lambdas[1])
        data = (1 + 1 / (2 * r)) * x0s[1] - 1 / (2 * r) * x0s[0] if i == 1 else x0s[i]
        want = s_next / s * want - a_next * (math.exp(lambdas[i] - lambdas[i + 1]) - 1) * data
    assert dpm_solver_pp_2m(gaussian(0.3), x, timesteps, ALPHAS).item() == pytest.approx(want, rel=1e-9)


def test_every_sampler_has_its_name_in_the_schema_of_configs():
    assert get_args(SamplerName) == tuple(SAMPLERS)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_any_eta_keeps_the_noise_level(eta):
    draw, x0, timesteps = (
        torch.Generator().manual_seed(0),
        torch.full((1, 1, 1, 1), 3.0),
        sampling_timesteps(10),
    )
    shape = (1, 1, 128, 128)
    x_T = ALPHAS[901].sqrt() * x0 + (1 - ALPHAS[901]).sqrt() * torch.randn(shape, generator=draw)
    asked = []

    def noise(i: int) -> torch.Tensor:
        asked.append(i)
        return torch.randn(shape, generator=draw)

    x = ddim(toward(x0), x_T, timesteps, ALPHAS, eta=eta, noise=noise)
    assert asked == list(range(10))
    assert x.mean().item() == pytest.approx(3 * ALPHAS[0].sqrt().item(), abs=1e-3)
    assert x.std().item() == pytest.approx((1 - ALPHAS[0]).sqrt().item(), rel=0.02)


def test_a_step_within_one_noise_level_changes_nothing():
    x = torch.full((1, 1, 2, 2), 2.0, dtype=torch.float64)
    same = torch.tensor([0, 0])
    torch.testing.assert_close(ddim(gaussian(1.0), x, same, ALPHAS, eta=1.0, noise=lambda i: x), x)
    torch.testing.assert_close(dpm_solver_pp_2m(gaussian(1.0), x, same, ALPHAS), x)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_predict_sees_every_timestep_and_callback_every_latent(sampler):
    seen, latents = [], []

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert t.shape == (3,) and t.dtype == torch.int64 and (t == t[0]).all()
        seen.append(t[0].item())
        return torch.zeros_like(x)

    x = torch.ones(3, 1, 2, 2, dtype=torch.bfloat16)
    end = sampler(predict, x, sampling_timesteps(4), ALPHAS, callback=lambda i, x: latents.append((i, x)))
    assert seen == ([751, 501, 501, 251, 1] if sampler is plms else [751, 501, 251, 1])
    assert [i for i, _ in latents] == [0, 1, 2, 3] and torch.equal(latents[-1][1], end)
    assert end.dtype == torch.bfloat16 and torch.equal(x, torch.ones_like(x))


def test_impossible_etas_are_refused():
    x, timesteps = torch.zeros(1, 1, 1, 1), sampling_timesteps(2)
    for sampler, eta in ((ddim, -0.1), (ddim, 1.1), (plms, 0.5), (dpm_solver_pp_2m, 0.5)):
        with pytest.raises(UserError, match="eta"):
            sampler(gaussian(1.0), x, timesteps, ALPHAS, eta=eta, noise=lambda i: x)
    with pytest.raises(ValueError, match="noise"):
        ddim(gaussian(1.0), x, timesteps, ALPHAS, eta=1.0)
