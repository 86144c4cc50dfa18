"""Drawing over a picture, against diffusers' own pipeline for it."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from diffusers.models.autoencoders import vae
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as reference
from PIL import Image

from ldm.errors import UserError
from ldm.pipeline import Text2Image
from tests.parity.test_files import family, pipeline, saved  # noqa: F401

SETTINGS = {"negative_prompt": "mud", "guidance_scale": 4.0}


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))


@pytest.mark.parametrize("strength, steps", [(0.35, 8), (1.0, 5)])
def test_it_draws_what_diffusers_draws(saved, photo, monkeypatch, strength, steps):  # noqa: F811
    t2i = Text2Image.from_file(saved)
    ours = t2i(["a dog"], seeds=[3], steps=steps, init_image=photo, strength=strength, **SETTINGS)[0].image
    noises = {name: t2i._noise(t2i.latent_shape(), [3], name) for name in ("init", "x_T")}
    monkeypatch.setattr(vae, "randn_tensor", lambda *_, **__: noises["init"])
    monkeypatch.setattr(reference, "randn_tensor", lambda *_, **__: noises["x_T"])
    text_to_image = StableDiffusionPipeline.from_pretrained(saved, local_files_only=True)
    pipe = StableDiffusionImg2ImgPipeline(**text_to_image.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    options = {"image": photo, "num_inference_steps": steps, "output_type": "np", **SETTINGS}
    theirs = pipe("a dog", strength=strength, **options).images[0]
    assert np.abs(np.asarray(ours) / 255 - theirs).max() <= 1 / 255 + 1e-4  # rounded to levels here
    noises["x_T"] = noises["x_T"] + 0.1
    assert (
        np.abs(np.asarray(ours) / 255 - pipe("a dog", strength=strength, **options).images[0]).max() > 4 / 255
    )


def test_a_picture_keeps_its_own_draws_in_any_batch_and_shape(saved, photo):  # noqa: F811
    t2i = Text2Image.from_file(saved)
    options = {"steps": 4, "strength": 0.5, "init_image": photo.resize((40, 25)), "height": 24, "width": 32}
    counted = []
    together = t2i(["a dog", "a cat"], seeds=[3, 4], progress=counted.append, **options)
    alone = t2i(["a cat"], seeds=[4], **options)
    torch.testing.assert_close(together[1].latents, alone[0].latents, rtol=1e-4, atol=1e-4)
    assert alone[0].image.size == (32, 24) and sum(counted) == 4


@pytest.mark.parametrize(
    "strength, said",
    [(0.0, "leaves no step of 4"), (0.1, "leaves no step of 4"), (1.5, "is not between 0 and 1")],
)
def test_a_strength_without_a_step_is_refused(saved, photo, strength, said):  # noqa: F811
    with pytest.raises(UserError, match=rf"{said}.*Choose from 0\.25 to 1"):
        Text2Image.from_file(saved)(["a dog"], seeds=[0], steps=4, init_image=photo, strength=strength)
