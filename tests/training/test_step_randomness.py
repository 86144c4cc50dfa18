"""The draws of a step: the item decides each of them, and all lie in one buffer."""

import pytest
import torch

from ldm import randomness
from ldm.diffusion.process import DiscreteDiffusion
from ldm.diffusion.schedule import make_alphas_cumprod
from ldm.randomness import stream_ids
from ldm.training.step_randomness import StepRandomness, latent_shape, sample_randomness

BATCH = {"stream": ["subject", "prior", "prior"], "item": torch.tensor([4, 4, 9])}
SHAPE = (3, 4, 8, 6)
PROCESS = DiscreteDiffusion(make_alphas_cumprod(), offset_noise=0.1)


@pytest.mark.parametrize("offset_noise", [0.0, 0.1])
def test_each_number_is_that_of_its_item_part_and_purpose(offset_noise: float):
    process = DiscreteDiffusion(make_alphas_cumprod(), offset_noise=offset_noise)
    found = sample_randomness(BATCH, 7, SHAPE, process)
    assert found["randomness"].dtype == torch.uint8
    draws = StepRandomness.views(found["randomness"].clone(), SHAPE)
    for k, (item, part) in enumerate(stream_ids(BATCH)):

        def source(purpose: str, item: int = item, part: str = part) -> torch.Generator:
            return randomness.generator(7, item, f"{part}/{purpose}")

        assert draws.timesteps[k] == torch.randint(1000, (), generator=source("timestep"))
        assert torch.equal(draws.posterior[k], torch.randn(SHAPE[1:], generator=source("posterior")))
        offset = offset_noise * torch.randn(4, 1, 1, generator=source("offset"))
        assert torch.equal(draws.noise[k], torch.randn(SHAPE[1:], generator=source("noise")) + offset)


def test_the_buffer_holds_nothing_else():
    draws = sample_randomness(BATCH, 7, SHAPE, PROCESS)
    views = StepRandomness.views(draws["randomness"], SHAPE)
    assert len(draws["randomness"]) == sum(view.nbytes for view in views)
    assert {view.untyped_storage().data_ptr() for view in views} == {draws["randomness"].data_ptr()}


def test_latents_of_moments_and_of_images_have_the_same_shape():
    of = {"channels": 4, "factor": 2}
    assert latent_shape({"latent_stats": torch.zeros(3, 8, 5, 6)}, **of) == (3, 4, 5, 6)
    assert latent_shape({"image": torch.zeros(3, 3, 10, 12)}, **of) == (3, 4, 5, 6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_they_are_pinned():
    found = sample_randomness(BATCH, 7, SHAPE, PROCESS)
    assert found["randomness"].is_pinned()
