"""Samplers where the end is known in closed form: a single point, and Gaussian data."""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import get_args

import pytest
import torch

from ldm.diffusion.process import DiscreteDiffusion, Level
from ldm.diffusion.samplers import (
    DEFAULT_SPACING,
    ENDS_CLEAN,
    SAMPLERS,
    SamplerName,
    ddim,
    dpm_solver_pp_2m,
    dpm_solver_pp_2m_sde,
    euler_a,
    plms,
)
from ldm.diffusion.schedule import SPACINGS, make_alphas_cumprod

PROCESS = DiscreteDiffusion(make_alphas_cumprod(dtype=torch.float64))
STOCHASTIC = {"euler_a", "dpm++2m_sde"}
DETERMINISTIC = {name: sampler for name, sampler in SAMPLERS.items() if name not in STOCHASTIC}


def toward(x0: torch.Tensor):
    """What is denoised when all data is `x0`."""
    return lambda x, level: x0.expand(x.shape)


def gaussian(std: float):
    """What is denoised when data is N(0, std²): linear in x."""
    return lambda x, level: level.a * std**2 / (level.a**2 * std**2 + level.s**2) * x


def standard_normal(shape: tuple[int, ...]) -> Callable[[int], torch.Tensor]:
    """Step noise."""
    draw = torch.Generator().manual_seed(1)
    return lambda i: torch.randn(shape, generator=draw)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_single_point_is_reached_in_any_number_of_steps(name, steps):
    """x ends on the line from x0 through its noise, or, where that level is without noise, at x0."""
    draw = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(2, 4, 3, 3, generator=draw) for _ in range(2))
    for clean in (False, True):
        levels = PROCESS.levels(steps, "leading", clean=clean)
        start, end = levels[0], levels[-1]
        x_T, step_noise = start.a * x0 + start.s * noise, standard_normal(x0.shape)
        x = SAMPLERS[name](toward(x0), x_T, levels, noise=step_noise)
        if clean or name not in STOCHASTIC:
            torch.testing.assert_close(x, end.a * x0 + end.s * noise, atol=2e-5, rtol=0)


def even_levels(steps: int) -> list[Level]:
    """From SD's noisiest level to its first one, even in log-SNR."""
    first, last = PROCESS.level(999).half_log_snr, PROCESS.level(0).half_log_snr
    lambdas = [first + (last - first) * i / steps for i in range(steps + 1)]
    scales = [1 / math.sqrt(1 + math.exp(-2 * half)) for half in lambdas]
    return [Level(a, a * math.exp(-half), math.nan) for a, half in zip(scales, lambdas, strict=True)]


def flow_error(sampler, steps: int, std: float = 1.5) -> float:
    """Relative to the exact flow, which scales x by the ratio of standard deviations of both noise levels."""
    levels, x = even_levels(steps), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    first, last = (level.a**2 * std**2 + level.s**2 for level in (levels[0], levels[-1]))
    return abs(sampler(gaussian(std), x, levels).item() / math.sqrt(last / first) - 1)


@pytest.mark.parametrize(
    "name, order", [("ddim", 1), ("euler", 1), ("plms", 2), ("heun", 2), ("dpm++2m", 2), ("unipc", 3)]
)
def test_each_sampler_converges_to_the_flow_with_its_order(name, order):
    """Halving the steps' length divides the error by 2^order."""
    errors = [flow_error(DETERMINISTIC[name], steps) for steps in (40, 80, 160)]
    found = [math.log2(a / b) for a, b in pairwise(errors)]
    assert found == pytest.approx([order, order], abs=0.1)
    assert errors[-1] < 0.01


def test_every_deterministic_sampler_has_its_order_tested():
    assert set(DETERMINISTIC) == {"ddim", "euler", "plms", "heun", "dpm++2m", "unipc"}


@pytest.mark.parametrize("name", sorted(STOCHASTIC))
def test_samples_with_fresh_noise_have_the_data_s_spread(name):
    """The variance of Gaussian data, through linear steps, and nearer to it with more of them."""
    shape, errors = (1, 1, 200, 200), []
    for steps in (10, 160):
        levels, draws = PROCESS.levels(steps, "karras"), standard_normal(shape)
        x = SAMPLERS[name](gaussian(0.7), draws(-1), levels, noise=draws)
        errors.append(abs(x.std().item() / 0.7 - 1))
    assert errors[1] < 0.03 and errors[1] < errors[0]


@pytest.mark.parametrize(
    "sampler",
    [partial(ddim, eta=0.5), partial(ddim, eta=1.0), euler_a, dpm_solver_pp_2m_sde],
    ids=["eta 0.5", "eta 1", "euler_a", "sde"],
)
def test_fresh_noise_keeps_the_noise_level(sampler):
    shape, x0 = (1, 1, 128, 128), torch.full((1, 1, 1, 1), 3.0)
    levels, draws, asked = PROCESS.levels(10, "leading"), standard_normal(shape), []

    def noise(i: int) -> torch.Tensor:
        asked.append(i)
        return draws(i)

    x = sampler(toward(x0), levels[0].a * x0 + levels[0].s * draws(-1), levels, noise=noise)
    assert asked == list(range(10))
    assert x.mean().item() == pytest.approx(3 * levels[-1].a, abs=1e-3)
    assert x.std().item() == pytest.approx(levels[-1].s, rel=0.02)
    with pytest.raises(ValueError, match="noise"):
        sampler(toward(x0), x, levels)


def test_steps_of_dpm_solver_pp_are_its_algorithm_by_hand():
    """Three steps, of which the one in the middle extrapolates the data by the ratio of its log-SNR steps."""
    levels, x = PROCESS.levels(3, "leading"), torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64)
    lambdas = [math.log(level.a / level.s) for level in levels]
    x0s, want = [], x.item()
    for i, (level, end) in enumerate(pairwise(levels)):
        x0s.append(level.a * 0.09 / (level.a**2 * 0.09 + level.s**2) * want)
        r = (lambdas[1] - lambdas[0]) / (lambdas[2] - lambdas[1])
        data = (1 + 1 / (2 * r)) * x0s[1] - 1 / (2 * r) * x0s[0] if i == 1 else x0s[i]
        want = end.s / level.s * want - end.a * (math.exp(lambdas[i] - lambdas[i + 1]) - 1) * data
    assert dpm_solver_pp_2m(gaussian(0.3), x, levels).item() == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_from_noise_alone_float32_is_enough(name):
    """Zero-terminal SNR: nothing is divided by the 2^-12 that is left of the signal, and the end is right."""
    alphas = make_alphas_cumprod(zero_terminal_snr=True, dtype=torch.float64)
    process, shape = DiscreteDiffusion(alphas, parameterization="v"), (1, 1, 64, 64)
    levels = process.levels(50, "trailing", clean=name in ENDS_CLEAN)
    x_T = standard_normal(shape)(-1)
    ends = [
        SAMPLERS[name](gaussian(0.7), x_T.to(dtype), levels, noise=standard_normal(shape))
        for dtype in (torch.float32, torch.float64)
    ]
    assert (ends[0] - ends[1]).abs().max() < 1e-4
    assert ends[1].std().item() == pytest.approx(0.7, rel=0.12)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_step_within_one_noise_level_changes_nothing(name):
    x, level = torch.full((1, 1, 2, 2), 2.0, dtype=torch.float64), PROCESS.level(300)
    torch.testing.assert_close(DETERMINISTIC[name](gaussian(1.0), x, [level] * 4), x)


@pytest.mark.parametrize("name", sorted(STOCHASTIC))
def test_no_noise_is_added_within_one_noise_level(name):
    x, level = torch.full((1, 1, 2, 2), 2.0, dtype=torch.float64), PROCESS.level(300)
    torch.testing.assert_close(SAMPLERS[name](gaussian(1.0), x, [level] * 4, noise=lambda i: x), x)


@pytest.mark.parametrize("name", SAMPLERS)
def test_denoise_sees_every_level_and_callback_every_latent(name):
    seen, latents = [], []

    def denoise(x: torch.Tensor, level: Level) -> torch.Tensor:
        seen.append(level.t)
        return torch.zeros_like(x)

    x, levels = torch.ones(3, 1, 2, 2, dtype=torch.bfloat16), PROCESS.levels(4, "leading")
    callback, noise = (lambda i, x: latents.append((i, x))), (lambda i: torch.ones_like(x))
    end = SAMPLERS[name](denoise, x, levels, noise=noise, callback=callback)
    twice = {"plms": [751, 501, 501, 251, 1], "heun": [751, 501, 501, 251, 251, 1, 1]}
    assert seen == twice.get(name, [751, 501, 251, 1])
    assert [i for i, _ in latents] == [0, 1, 2, 3] and torch.equal(latents[-1][1], end)
    assert end.dtype == torch.bfloat16 and torch.equal(x, torch.ones_like(x))


def test_euler_is_ddim_to_the_bit_and_plms_is_ahead():
    levels, x = PROCESS.levels(20, "trailing", clean=True), standard_normal((1, 4, 8, 8))(-1)
    assert torch.equal(SAMPLERS["euler"](gaussian(0.7), x, levels), ddim(gaussian(0.7), x, levels))
    assert flow_error(plms, 50) < flow_error(ddim, 50) / 5


def test_every_sampler_has_its_name_in_the_schema_of_configs_and_a_spacing():
    assert get_args(SamplerName) == tuple(SAMPLERS) == tuple(DEFAULT_SPACING)
    assert set(DEFAULT_SPACING.values()) <= set(SPACINGS) and ENDS_CLEAN < set(SAMPLERS)


@pytest.mark.parametrize("name", sorted(DETERMINISTIC))
@pytest.mark.parametrize("steps", [8, 20, 50])
def test_the_step_from_noise_alone_goes_no_farther_than_the_data_does(name: str, steps: int):
    """Zero-terminal SNR: two predictions of x0 that differ by d move x by a d at most, at the step's end.

    A mean of eps at both ends of the step would move it by many times that.
    """
    alphas = make_alphas_cumprod(zero_terminal_snr=True, dtype=torch.float64)
    process = DiscreteDiffusion(alphas, parameterization="v")
    noise, seen = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 1, 9), []
    levels = process.levels(steps, "trailing", clean=True)
    first, end = levels[:2]
    assert first.is_noise_alone and not any(level.is_noise_alone for level in levels[1:])
    x_T = first.a * 0.3 + first.s * noise
    DETERMINISTIC[name](
        lambda x, level: torch.full_like(x, 0.3 if level == first else 0.4),
        x_T,
        levels,
        callback=lambda i, x: seen.append(x),
    )
    assert (seen[0] - end.a * 0.3 - end.s * noise).abs().max() <= 0.1 * end.a + 1e-9
