"""The schedule against its published numbers, and the levels of a sampling."""

import pytest
import torch

from ldm.diffusion.schedule import karras_sigmas, make_alphas_cumprod, sampling_timesteps
from ldm.errors import UserError

ALPHAS = make_alphas_cumprod()


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


def test_an_unknown_schedule_is_answered_with_the_valid_ones():
    with pytest.raises(UserError, match="cosine.*scaled_linear, linear"):
        make_alphas_cumprod(beta_schedule="cosine")


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
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
    for spacing in ("trailing", "linspace"):
        assert sampling_timesteps(1, spacing=spacing).tolist() == [999]


def test_karras_ratios_go_from_end_to_end_and_are_even_in_their_seventh_root():
    sigmas = torch.tensor(karras_sigmas(6, 0.03, 14.6), dtype=torch.float64)
    assert sigmas[0].item() == pytest.approx(14.6) and sigmas[-1].item() == pytest.approx(0.03)
    steps = (sigmas ** (1 / 7)).diff()
    torch.testing.assert_close(steps, steps[:1].expand(5))
    assert karras_sigmas(1, 0.03, 14.6) == pytest.approx([14.6])
