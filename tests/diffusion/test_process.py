"""The noise process: its conversions against their inverses, its levels, its draws."""

import math

import pytest
import torch
from torch import nn

from ldm.diffusion.process import CLEAN, PARAMETERIZATIONS, DiscreteDiffusion
from ldm.diffusion.schedule import SPACINGS, make_alphas_cumprod
from ldm.errors import UserError
from ldm.randomness import ItemRNG, generator

ALPHAS = make_alphas_cumprod(dtype=torch.float64)
TIMESTEPS = torch.tensor([0, 1, 250, 499, 998, 999])
EPS = DiscreteDiffusion(ALPHAS)
NEAR = {"rtol": 1e-5, "atol": 2e-6}  # float32


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """x0 and noise, [6, 4, 3, 5] float32."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(6, 4, 3, 5, generator=draw), torch.randn(6, 4, 3, 5, generator=draw)


def denoised(process: DiscreteDiffusion, prediction: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
    """Item k of both is at TIMESTEPS[k]."""
    levels = [process.level(t) for t in TIMESTEPS.tolist()]
    return torch.stack(
        [process.denoised(*each) for each in zip(prediction.double(), x_t.double(), levels, strict=True)]
    )


def test_noisy_latents_keep_unit_variance_and_their_own_timestep(pair):
    x0, noise = pair
    noisy = EPS.add_noise(x0, noise, TIMESTEPS)
    for i, t in enumerate(TIMESTEPS):
        a, s = ALPHAS[t].sqrt(), (1 - ALPHAS[t]).sqrt()
        torch.testing.assert_close(noisy[i].double(), a * x0[i].double() + s * noise[i].double(), **NEAR)


def test_coefficients_stay_float32_for_bfloat16_latents():
    """At t = 0 and 1 bfloat16 coefficients would be equal: sqrt(0.99915) and sqrt(0.9983) both round to 1."""
    x0, noise = torch.zeros(2, 1, 1, 1, dtype=torch.bfloat16), torch.ones(2, 1, 1, 1, dtype=torch.bfloat16)
    noisy = EPS.add_noise(x0, noise, torch.tensor([0, 1]))
    assert noisy.dtype == torch.bfloat16
    expected = (1 - ALPHAS[:2].float()).sqrt().to(torch.bfloat16)
    assert torch.equal(noisy.flatten(), expected) and noisy[0] != noisy[1]


def test_snr_is_signal_over_noise_variance():
    alphas = ALPHAS.float()[TIMESTEPS]
    torch.testing.assert_close(EPS.snr(TIMESTEPS), alphas / (1 - alphas))
    assert EPS.snr(torch.tensor([0])).item() == pytest.approx(0.99915 / 0.00085, rel=1e-3)


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_a_perfect_prediction_gives_back_the_latent(parameterization, pair):
    process, (x0, noise) = DiscreteDiffusion(ALPHAS, parameterization=parameterization), pair
    x_t = process.add_noise(x0, noise, TIMESTEPS)
    found = denoised(process, process.target(x0, noise, TIMESTEPS), x_t)
    torch.testing.assert_close(found, x0.double(), atol=3e-5, rtol=1e-4)  # from eps: divides by 0.068


@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_a_neighbouring_timestep_would_be_seen(parameterization, pair):
    process, (x0, noise) = DiscreteDiffusion(ALPHAS, parameterization=parameterization), pair
    t = torch.full((6,), 500)
    perfect, x_t = process.target(x0, noise, t), process.add_noise(x0, noise, t)
    assert (process.denoised(perfect, x_t, process.level(501)) - x0).abs().max() > 1e-3


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_an_error_of_the_prediction_is_as_large_in_x0_as_its_scale_says(parameterization, pair):
    process, (x0, noise) = DiscreteDiffusion(ALPHAS, parameterization=parameterization), pair
    x_t, target = process.add_noise(x0, noise, TIMESTEPS), process.target(x0, noise, TIMESTEPS)
    moved = denoised(process, target + 0.1, x_t) - denoised(process, target, x_t)
    scale = torch.as_tensor(process.error_scale(TIMESTEPS)).expand(6)
    torch.testing.assert_close((0.1 / moved[:, 0, 0, 0]).square(), scale.double(), rtol=1e-4, atol=0)


def test_v_is_the_tangent_of_the_noising_circle():
    """v is orthogonal to x_t where x0 and noise are: v = a eps - s x0 (Salimans & Ho 2022)."""
    process = DiscreteDiffusion(ALPHAS, parameterization="v")
    x0, noise = torch.zeros(6, 2), torch.zeros(6, 2)
    x0[:, 0], noise[:, 1] = 1, 1
    v, x_t = process.target(x0, noise, TIMESTEPS), process.add_noise(x0, noise, TIMESTEPS)
    torch.testing.assert_close((v * x_t).sum(1), torch.zeros(6), atol=1e-6, rtol=0)
    torch.testing.assert_close(v[:, 1], ALPHAS[TIMESTEPS].sqrt().float())


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_targets_have_the_dtype_of_the_latents(parameterization, pair):
    process, (x0, noise) = DiscreteDiffusion(ALPHAS, parameterization=parameterization), pair
    assert process.target(x0.bfloat16(), noise, TIMESTEPS).dtype == torch.bfloat16
    assert process.add_noise(x0.bfloat16(), noise, TIMESTEPS).dtype == torch.bfloat16


def test_the_schedule_moves_with_the_model_and_is_in_no_state_dict():
    process = DiscreteDiffusion(ALPHAS)
    assert process.state_dict() == {} and [name for name, _ in process.named_buffers()] == ["alphas_cumprod"]
    assert torch.equal(process.alphas_cumprod, make_alphas_cumprod())
    with torch.device("meta"):  # as memory is estimated
        away = DiscreteDiffusion(make_alphas_cumprod())
    assert away.alphas_cumprod.is_meta and away.level(999) == DiscreteDiffusion(make_alphas_cumprod()).level(
        999
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_schedule_stays_in_float32_when_a_model_is_cast(dtype: torch.dtype, pair):
    """In bfloat16 its first values are 1: no noise is added there, and an exported schedule has NaN."""
    module, (x0, noise) = nn.Module(), pair
    own = DiscreteDiffusion(ALPHAS)
    module.process = DiscreteDiffusion(ALPHAS)
    module.to(dtype)
    assert torch.equal(module.process.alphas_cumprod, own.alphas_cumprod)
    assert module.process.alphas_cumprod.dtype == torch.float32
    assert torch.equal(module.process.add_noise(x0, noise, TIMESTEPS), own.add_noise(x0, noise, TIMESTEPS))
    assert module.process.snr(torch.tensor([0])).isfinite()
    assert "alphas_cumprod" in dict(module.process.named_buffers())
    assert module.to("meta").process.alphas_cumprod.is_meta


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_levels_fall_from_the_first_step_to_the_end(spacing, steps):
    for clean in (False, True):
        levels = EPS.levels(steps, spacing, clean=clean)
        assert len(levels) == steps + 1
        assert all(a.s >= b.s and a.a <= b.a for a, b in zip(levels, levels[1:], strict=False))
        assert all(level.a**2 + level.s**2 == pytest.approx(1, abs=1e-14) for level in levels)
        assert levels[-1] == (CLEAN if clean or spacing == "karras" else EPS.level(0))
        if spacing != "leading":
            assert tuple(levels[0]) == pytest.approx(EPS.level(999))


def test_a_level_is_that_of_its_timestep_whole_or_not():
    """Karras' levels lie between timesteps: log(s / a) is linear between those."""
    for level in EPS.levels(20, "karras")[:-1]:
        below, above = EPS.level(math.floor(level.t)), EPS.level(math.ceil(level.t))
        part = level.t - math.floor(level.t)
        expected = (1 - part) * below.half_log_snr + part * above.half_log_snr
        assert level.half_log_snr == pytest.approx(expected, abs=1e-9)
    assert {level.t % 1 != 0 for level in EPS.levels(20, "karras")[1:-2]} == {True}


def test_impossible_steps_and_spacings_are_refused():
    for steps in (0, -1, 1001):
        for spacing in SPACINGS:
            with pytest.raises(UserError, match="1 to 1000"):
                EPS.levels(steps, spacing)
    with pytest.raises(UserError, match="leading, trailing, linspace, karras"):
        EPS.levels(5, "quad")


def test_zero_terminal_snr_is_known_and_begins_at_the_end():
    process = DiscreteDiffusion(make_alphas_cumprod(zero_terminal_snr=True), parameterization="v")
    assert process.zero_terminal_snr and not EPS.zero_terminal_snr
    for spacing in ("trailing", "linspace", "karras"):
        assert tuple(process.levels(5, spacing)[0]) == pytest.approx((2**-12, 1.0, 999.0), abs=1e-6)
    with pytest.raises(UserError, match="must begin at the last timestep.*trailing"):
        process.levels(5, "leading")
    with pytest.raises(UserError, match="needs v-prediction"):
        DiscreteDiffusion(make_alphas_cumprod(zero_terminal_snr=True))


@pytest.mark.parametrize("offset_noise", [0.0, 0.3])
def test_draws_are_those_of_each_item(offset_noise):
    process = DiscreteDiffusion(ALPHAS, offset_noise=offset_noise)
    ids = [(4, "subject"), (4, "prior")]
    t, noise = torch.empty(2, dtype=torch.int64), torch.empty(2, 4, 3, 5)
    process.sample_times(ItemRNG(7, ids), t)
    process.sample_noise(ItemRNG(7, ids), noise)
    for k, (item, stream) in enumerate(ids):
        draw = {p: generator(7, item, f"{stream}/{p}") for p in ("timestep", "noise", "offset")}
        assert t[k] == torch.randint(1000, (), generator=draw["timestep"])
        plain = torch.randn(4, 3, 5, generator=draw["noise"])
        offset = torch.randn(4, 1, 1, generator=draw["offset"])
        assert torch.equal(noise[k], plain + offset_noise * offset)


def test_a_picture_begins_at_its_level_and_noise_as_it_is(pair):
    x0, noise = pair
    level = EPS.level(500)
    assert EPS.start(noise, level) is noise
    torch.testing.assert_close(EPS.start(noise, level, x0), EPS.add_noise(x0, noise, torch.full((6,), 500)))


def test_differences_to_another_process_are_said():
    other = [
        (DiscreteDiffusion(ALPHAS, parameterization="v"), "its prediction type: v, not eps"),
        (DiscreteDiffusion(ALPHAS[:500]), "its timesteps: 500, not 1000"),
        (DiscreteDiffusion(make_alphas_cumprod(linear_end=0.02)), "it has another noise schedule"),
    ]
    for process, said in other:
        assert EPS.differences(process) == [said]
    assert EPS.differences(DiscreteDiffusion(make_alphas_cumprod(), offset_noise=0.1)) == []


def test_an_unknown_prediction_is_answered_with_the_valid_ones():
    with pytest.raises(UserError, match="epsilon.*eps, v, x0"):
        DiscreteDiffusion(ALPHAS, parameterization="epsilon")
