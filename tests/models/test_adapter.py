"""Adapters by lycoris-lora: nothing at the start, their own library's prediction from the exported file."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.models.adapter import Adapter
from ldm.models.lora import lora_off
from ldm.runs.memory import estimate
from ldm.schema import RunConfig, TrainerOptions
from ldm.training.cuda_graph import check_cuda_graph
from ldm.training.latent_diffusion import LatentDiffusion
from tests.factories import TAUGHT, build_module, run_config
from tests.short_runs import At, Job, Killed, differences, kill, state_of

pytest.importorskip("lycoris", reason="needs lycoris-lora, whose adapters they are")

KINDS = ["dora", "loha", "lokr", "oft"]
EVERY = ["attention", "feed_forward", "projections", "convolutions"]
PROMPTS = ["a photo of sks disc", "a disc"]


def build(config: dict, networks: dict[str, nn.Module], kind: str, **more: object) -> LatentDiffusion:
    adapter = {"kind": kind, "rank": 4, "unet": EVERY, "text_encoder": EVERY[:2], **more}
    module = build_module(config, seed=7, trainable={"adapter": adapter})
    for name, network in module.networks.items():
        network.load_state_dict(networks[name].state_dict())
    module.add_learned_token()  # as a run does when the base's weights are there
    return module


def randomized(module: LatentDiffusion) -> LatentDiffusion:
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.lora.named_parameters():
            parameter += 0.1 * torch.randn_like(parameter) * (0.1 if name.endswith("oft_blocks") else 1)
    return module


def prediction(module: LatentDiffusion) -> Tensor:
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([100, 700])
    with torch.no_grad():
        return module.apply_model(x, t, module.condition(PROMPTS))


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_start_nothing_changes_and_off_neither(tiny_config: dict, tiny_networks: dict, kind: str):
    plain = build_module(tiny_config, seed=7)
    for name, network in plain.networks.items():
        network.load_state_dict(tiny_networks[name].state_dict())
    module = build(tiny_config, tiny_networks, kind)
    expected = prediction(plain)
    torch.testing.assert_close(prediction(module), expected, rtol=1e-4, atol=1e-5)
    randomized(module)
    assert (prediction(module) - expected).abs().max() > 0.01
    with lora_off(module.lora):
        assert torch.equal(prediction(module), expected)
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {
        f"lora.{name}" for name, _ in module.lora.named_parameters()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_it_resumes_to_the_bit(job: Job, tmp_path: Path, kind: str):
    job = replace(job, data={"prior_caption_dropout": 0.5}, steps=3)
    params = TAUGHT | {"trainable": {"adapter": {"kind": kind, "rank": 2}}}
    whole = job(tmp_path / "whole", params=params, checkpoint_every=1)
    with pytest.raises(Killed):
        job(tmp_path / "again", callbacks=[At(1, kill)], params=params)
    again = job(tmp_path / "again", params=params)
    assert differences(state_of(tmp_path / "whole", 3), state_of(tmp_path / "again", 3)) == []
    assert differences(whole.state_dict(), again.state_dict()) == []
    assert any(parameter.abs().max() > 0 for parameter in whole.lora.parameters())


def test_the_norm_for_l2_sp_is_of_the_change(tiny_config: dict, tiny_networks: dict):
    module = randomized(build(tiny_config, tiny_networks, "lokr"))
    for (network, name), layer in module.lora.adapted().items():
        own = module.networks[network].get_submodule(name).weight
        assert float(layer.squared_norm().detach()) == pytest.approx(
            float((layer.merged() - own).square().sum())
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_forecast_counts_it(tiny_config: dict, tiny_model_file: Path, subject_folder: Path, kind: str):
    config = run_config(tiny_config, base=tiny_model_file, subject=subject_folder, name="x")
    adapter = {"kind": kind, "rank": 4, "unet": EVERY}
    config["model"]["params"] |= {"trainable": {"adapter": adapter}, **TAUGHT}
    config["trainer"]["max_steps"] = 1
    needs, _ = estimate(RunConfig.parse(config))
    assert "copies of the base" not in needs and needs["unet"].states == 0
    assert needs["lora"].states > 0 and needs["lora"].gradients * 2 <= needs["lora"].states


def test_what_cannot_be_is_refused(tiny_config: dict, monkeypatch: pytest.MonkeyPatch):
    lora = {"target": "ldm.models.lora.LoRA"}
    with pytest.raises(UserError, match="exclude each other"):
        build_module(tiny_config, trainable={"lora": lora, "adapter": {"kind": "loha"}})
    with pytest.raises(UserError, match="A loha has no factor"):
        Adapter(kind="loha", factor=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for kind in ("oft", "loha"):
        module = build_module(tiny_config, trainable={"adapter": {"kind": kind}}, cuda_graph=True)
        with pytest.raises(UserError, match=rf"adapter \({kind}\) waits for the device, a CUDA graph cannot"):
            check_cuda_graph(module, TrainerOptions(max_steps=1))
    module = build_module(tiny_config, trainable={"adapter": {"kind": "dora"}}, cuda_graph=True)
    check_cuda_graph(module, TrainerOptions(max_steps=1))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="lycoris-lora, which is not installed.*pip install"):
        Adapter(kind="loha")
