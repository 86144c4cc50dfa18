"""The schedule against diffusers with Stable Diffusion's settings."""

import pytest
import torch
from diffusers import DDIMScheduler

from ldm.diffusion.process import DiscreteDiffusion
from ldm.diffusion.schedule import make_alphas_cumprod

X0, NOISE = torch.randn(2, 64, 4, 4, 4, generator=torch.Generator().manual_seed(0))
TIMESTEPS = torch.linspace(0, 999, 64).long()


@pytest.fixture
def reference() -> DDIMScheduler:
    return DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


@pytest.mark.parametrize("ours, theirs", [("scaled_linear", "scaled_linear"), ("linear", "linear")])
def test_alphas_cumprod(ours, theirs):
    reference = DDIMScheduler(beta_schedule=theirs, beta_start=0.00085, beta_end=0.012)
    alphas = make_alphas_cumprod(beta_schedule=ours)
    torch.testing.assert_close(
        alphas, reference.alphas_cumprod, rtol=3e-5, atol=0
    )  # theirs: float32 products
    assert ((alphas[1:] - reference.alphas_cumprod[:-1]).abs() > 1e-5).all()


def test_add_noise(reference):
    ours = DiscreteDiffusion(reference.alphas_cumprod).add_noise(X0, NOISE, TIMESTEPS)
    torch.testing.assert_close(ours, reference.add_noise(X0, NOISE, TIMESTEPS), rtol=1e-5, atol=1e-6)


def test_v_target(reference):
    process = DiscreteDiffusion(reference.alphas_cumprod, parameterization="v")
    ours = process.target(X0, NOISE, TIMESTEPS)
    torch.testing.assert_close(ours, reference.get_velocity(X0, NOISE, TIMESTEPS), rtol=1e-5, atol=1e-6)
