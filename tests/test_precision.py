"""Pictures drawn in a lower precision than the weights: near the same, and nothing else changes."""

import copy

import pytest
import torch
from torch import nn

from ldm.data.buckets import Shape
from ldm.data.priors import PriorSet
from ldm.diffusion.process import DiscreteDiffusion
from ldm.diffusion.schedule import make_alphas_cumprod
from ldm.pipeline import Text2Image
from ldm.precision import autocast_for, resolve_precision
from ldm.runs.sampling import (
    PriorsConfig,
    SamplesConfig,
    generate_samples,
    prior_generator,
    prior_set,
    text2image,
)
from tests.factories import build_module

SMALL = {"steps": 4, "height": 16, "width": 24, "guidance_scale": 3.0}


@pytest.fixture
def pipeline(tiny_networks: dict[str, nn.Module]) -> Text2Image:
    return Text2Image(**tiny_networks, process=DiscreteDiffusion(make_alphas_cumprod()), default_size=16)


def dtypes_of_convolutions(*networks: nn.Module) -> set[torch.dtype]:
    """What the convolutions compute from now on."""
    seen: set[torch.dtype] = set()
    for layer in (layer for network in networks for layer in network.modules()):
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda layer, inputs, output: seen.add(output.dtype))
    return seen


def latents(pipeline: Text2Image, **options) -> torch.Tensor:
    samples = pipeline(["a dog", "a cat"], seeds=[0, 1], **SMALL | options)
    return torch.stack([sample.latents for sample in samples])


@pytest.mark.parametrize("sampler", ["ddim", "dpm++2m"])
def test_bf16_is_near_fp32_and_computed_as_such(pipeline, sampler):
    seen = [dtypes_of_convolutions(network) for network in (pipeline.unet, pipeline.vae)]
    exact = latents(pipeline, sampler=sampler)
    assert seen == [{torch.float32}] * 2
    for dtypes in seen:
        dtypes.clear()
    near = latents(pipeline, sampler=sampler, precision="bf16")
    assert seen == [{torch.bfloat16}] * 2 and near.dtype == torch.float32
    assert 0 < (near - exact).norm() / exact.norm() < 0.02
    assert not torch.is_autocast_enabled("cpu")
    assert torch.equal(latents(pipeline, sampler=sampler, precision="fp32"), exact)


def test_auto_is_bf16_on_cuda_alone():
    assert [resolve_precision("auto", device) for device in ("cpu", "cuda:1", "mps")] == [
        "fp32",
        "bf16",
        "fp32",
    ]
    assert resolve_precision("fp16", torch.device("cpu")) == "fp16"


def test_networks_in_a_lower_dtype_keep_it(pipeline):
    for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        network.to(torch.bfloat16)
    seen = dtypes_of_convolutions(pipeline.unet)
    with autocast_for("bf16", pipeline.unet, pipeline.vae):
        assert not torch.is_autocast_enabled("cpu")
    assert torch.equal(latents(pipeline, precision="bf16"), latents(pipeline)) and seen == {torch.bfloat16}


@pytest.mark.parametrize("mixed", [False, True])
def test_drawing_leaves_a_training_run_as_it_was(tiny_config, tiny_networks, mixed):
    """Loss and gradients to the bit, inside the autocast of a run too."""
    module = build_module(tiny_config).train()
    for name, network in module.networks.items():
        network.load_state_dict(tiny_networks[name].state_dict())
    batch = {
        "latent_stats": torch.ones(2, 8, 8, 8),
        "caption": ["a dog", "a cat"],
        "stream": ["subject", "prior"],
        "item": torch.tensor([0, 0]),
    }

    def gradients(draws: bool) -> list[torch.Tensor]:
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            if draws:
                latents(text2image(module, size=16), precision="bf16")
            loss = module.loss_per_item(batch).sum()
            if draws:
                latents(text2image(module, size=16), precision="bf16")
        loss.backward()
        return [loss.detach(), *(p.grad for p in module.parameters() if p.grad is not None)]

    before = copy.deepcopy(module.state_dict())
    plain, drawn = gradients(False), gradients(True)
    assert len(plain) > 50 and all(torch.equal(a, b) for a, b in zip(plain, drawn, strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_prior_images_and_samples_are_drawn_in_their_own_precision(pipeline, tmp_path):
    """It is part of a prior set's name, and both kinds of drawing hand it on."""

    def priors(device: str, **settings) -> PriorSet:
        drawing = PriorsConfig(folder=str(tmp_path), steps=2, **settings)
        about = {"base_sha256": "ab", "process": pipeline.process, "device": torch.device(device)}
        return prior_set("a photo of a dog", drawing, shape=Shape.square(16), **about)

    on_cpu, on_gpu = priors("cpu"), priors("cuda")
    assert on_cpu.folder == priors("cpu", precision="fp32").folder != on_gpu.folder
    assert on_gpu.folder == priors("cpu", precision="bf16").folder
    seen = dtypes_of_convolutions(pipeline.unet, pipeline.vae)
    for priors_, expected in ((on_cpu, torch.float32), (on_gpu, torch.bfloat16)):
        prior_generator(priors_.spec, pipeline, batch_size=2)([0, 1])
        assert seen == {expected}
        seen.clear()
    generate_samples(pipeline, SamplesConfig(steps=1, n=1, precision="bf16"), ["a dog"])
    assert seen == {torch.bfloat16}
