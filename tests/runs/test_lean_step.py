"""A step does no work twice and never waits for the device."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from ldm import conditioner
from ldm.engine.device import device_of, temporarily_on
from ldm.errors import UserError
from ldm.runs.callbacks import OffloadVAE
from ldm.runs.dreambooth import DreamBoothRun
from ldm.schema import RunConfig, TrainerOptions
from ldm.training.latent_diffusion import LatentDiffusion
from tests.factories import LEAN, LEAN_BF16, MIN_SNR, build_module, run_config

PROMPTS = ["a photo of sks disc", "a photo of a disc", "a photo of sks disc"]


def make(tiny_config: dict, tiny_networks: dict, **params) -> LatentDiffusion:
    module = build_module(tiny_config, seed=7, **params)
    for name, network in module.networks.items():
        network.load_state_dict(tiny_networks[name].state_dict())
    return module


def batch_of(first: int) -> dict:
    generator = torch.Generator().manual_seed(first)
    return {
        "latent_stats": torch.rand(3, 8, 8, 8, generator=generator),
        "caption": PROMPTS,
        "stream": ["subject", "prior", "subject"],
        "item": torch.arange(first, first + 3),
    }


def count_rows(module: LatentDiffusion) -> list[int]:
    """Prompts in each pass through the text encoder, from now on."""
    rows: list[int] = []
    module.cond_stage_model.register_forward_pre_hook(lambda _, ids: rows.append(len(ids[0])))
    return rows


def test_a_frozen_text_encoder_reads_each_prompt_once(tiny_config: dict, tiny_networks: dict):
    """Its context is the one that a text encoder which learns would give; so is the loss."""
    frozen = make(tiny_config, tiny_networks, trainable={"text_encoder": False})
    plain = make(tiny_config, tiny_networks, trainable={"text_encoder": True})
    rows = count_rows(frozen)
    for step in range(3):
        assert torch.equal(frozen.loss_per_item(batch_of(3 * step)), plain.loss_per_item(batch_of(3 * step)))
    assert rows == [2]
    contexts = [module.condition(["new", PROMPTS[1]]).context for module in (frozen, plain)]
    assert torch.equal(contexts[0][1], contexts[1][1])
    assert rows == [2, 1]
    frozen.on_train_start()
    frozen.condition(PROMPTS)
    assert rows == [2, 1, 2]


@pytest.mark.parametrize("train_text_encoder", [True, False])
def test_each_prompt_is_tokenized_once_a_run(
    tiny_config: dict, tiny_networks: dict, monkeypatch: pytest.MonkeyPatch, train_text_encoder: bool
):
    module = make(tiny_config, tiny_networks, trainable={"text_encoder": train_text_encoder})
    tokenized, tokenize = [], module.cond_stage_model.tokenize
    monkeypatch.setattr(
        module.cond_stage_model, "tokenize", lambda prompts: tokenized.extend(prompts) or tokenize(prompts)
    )
    with torch.inference_mode():
        module.validation_step(batch_of(0), 0)
    for step in range(3):
        module.training_step(batch_of(3 * step), step).backward()
    assert tokenized == PROMPTS[:2]


def test_a_learning_text_encoder_reads_each_prompt_once_a_step(tiny_config: dict, tiny_networks: dict):
    module = make(tiny_config, tiny_networks)
    rows = count_rows(module)
    for step in range(2):
        module.training_step(batch_of(3 * step), step).backward()
    assert rows == [2, 2]
    assert any(p.grad is not None for p in module.cond_stage_model.parameters())


def test_contexts_kept_by_validation_serve_training(tiny_config: dict, tiny_networks: dict):
    module = make(tiny_config, tiny_networks, trainable={"text_encoder": False})
    with torch.inference_mode():
        module.validation_step(batch_of(0), 0)
    module.training_step(batch_of(3), 0).backward()
    assert any(p.grad.any() for p in module.networks["unet"].parameters() if p.grad is not None)


def test_contexts_do_not_pile_up(tiny_config: dict, tiny_networks: dict, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(conditioner, "KEPT_PROMPTS", 4)
    module = make(tiny_config, tiny_networks, trainable={"text_encoder": False})
    for k in range(6):
        alone = module.condition([f"disc {k}"]).context
        assert torch.equal(module.condition([f"disc {k}", "disc"]).context[:1], alone)
        assert len(module.conditioner.encodings) <= 4 and len(module.conditioner.ids) <= 4


@pytest.mark.parametrize("train_text_encoder", [True, False])
def test_a_step_never_reads_the_device(tiny_config: dict, train_text_encoder: bool):
    """On the meta device there is nothing to read: `.item()`, `.tolist()` and branches on tensors raise."""
    with torch.device("meta"):
        settings = {"objective": {"weighting": MIN_SNR}, "trainable": {"text_encoder": train_text_encoder}}
        module = build_module(tiny_config, **settings)
    module.to("meta")
    batch = module.on_before_batch_transfer(batch_of(0), 0)
    there = {name: value.to("meta") if torch.is_tensor(value) else value for name, value in batch.items()}
    loss = module.training_step(there, 0)
    loss.backward()
    assert loss.is_meta
    with pytest.raises((RuntimeError, NotImplementedError)):
        loss.item()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_never_waits_for_the_gpu(tiny_config: dict, tiny_networks: dict):
    module = make(tiny_config, tiny_networks).cuda()
    batch = module.on_before_batch_transfer(batch_of(0), 0)
    there = module.transfer_batch_to_device(batch, module.device, 0)
    module.training_step(there, 0).backward()  # the first step sets kernels up
    torch.cuda.set_sync_debug_mode("error")
    try:
        module.training_step(there, 1).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_bfloat16_weights_learn_through_the_same_step(tiny_config: dict, tiny_networks: dict):
    """The loss is float32's to bfloat16's rounding; schedule, draws and the autoencoder stay float32."""
    exact = make(tiny_config, tiny_networks)
    rounded = make(tiny_config, tiny_networks, optimizer=LEAN_BF16)
    assert {p.dtype for name in ("unet", "text_encoder") for p in rounded.networks[name].parameters()} == {
        torch.bfloat16
    }
    schedule = rounded.process.alphas_cumprod
    assert schedule.dtype == next(rounded.first_stage_model.parameters()).dtype == torch.float32
    torch.testing.assert_close(
        rounded.loss_per_item(batch_of(0)), exact.loss_per_item(batch_of(0)), rtol=0.02, atol=0
    )


def test_a_trainer_that_clips_is_refused_before_any_work(tiny_config: dict):
    module = build_module(tiny_config, optimizer=LEAN)
    module.check(TrainerOptions(max_steps=3))
    with pytest.raises(UserError, match="gradient_clip_val"):
        module.check(TrainerOptions(max_steps=3, gradient_clip_val=1.0))


def test_where_a_trainer_computes():
    here = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert device_of(TrainerOptions(max_steps=1)).type == here
    assert device_of(TrainerOptions(max_steps=1, accelerator="cpu", devices=2)) == torch.device("cpu")


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("online", [True, False])
def test_the_autoencoder_leaves_only_where_nothing_needs_it(tiny_config: dict, cached: bool, online: bool):
    """Prior images that are drawn between two steps are decoded on the device."""
    data = SimpleNamespace(cache_latents=cached, online_priors=online)
    config = RunConfig.parse(
        run_config(tiny_config, base="b", subject="s", name="x", trainer={"max_steps": 1})
    )
    run = SimpleNamespace(data=data, config=config, samples=SimpleNamespace(every_steps=0))
    leaves = [isinstance(callback, OffloadVAE) for callback in DreamBoothRun._callbacks(run)]
    assert any(leaves) == (cached and not online)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_autoencoder_comes_back_for_pictures_only(tiny_config: dict):
    module = build_module(tiny_config).cuda()
    OffloadVAE().on_fit_start(None, module)
    assert {p.device.type for p in module.networks["vae"].parameters()} == {"cpu"}
    with temporarily_on(module.networks["vae"], module.device):
        assert {p.device.type for p in module.networks["vae"].parameters()} == {"cuda"}
    assert {p.device.type for p in module.networks["vae"].parameters()} == {"cpu"}
    assert {p.device.type for p in module.cond_stage_model.parameters()} == {"cuda"}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_freed_memory_is_not_handed_back():
    """The pages of tensors as large as activations are there when the next ones want them."""
    code = """
import resource, torch
from ldm.runs.dreambooth import DreamBoothRun
from ldm.schema import RunConfig, TrainerOptions
from ldm.engine.device import keep_freed_memory
def faults(keep):
    if keep:
        keep_freed_memory()
    for k in range(20):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        large = [torch.ones(2**22) for _ in range(8)]
        del large
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(False), faults(True))
"""
    fixed = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}  # glibc's own, to begin
    command, env = [sys.executable, "-c", code], os.environ | fixed  # with: it adapts them as the heap falls
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    plain, kept = map(int, done.stdout.split())
    assert kept < 100 < plain
