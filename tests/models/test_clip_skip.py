"""Clip skip of SD 1.x: an earlier layer's output after the final norm, in training, sampling and metadata."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.checkpoints.infer_config import model_config
from ldm.checkpoints.modelspec import file_metadata
from ldm.checkpoints.save_folder import save_folder
from ldm.conditioner import Conditioner, clip_skip_of
from ldm.config import instantiate
from ldm.contact_sheet import parameters_line, save_image
from ldm.diffusion.process import DiscreteDiffusion
from ldm.diffusion.schedule import make_alphas_cumprod
from ldm.errors import UserError
from ldm.models.text_encoder import CLIPTextEncoder
from ldm.pipeline import Text2Image
from ldm.runs import run
from ldm.schema import RunConfig
from tests.factories import build_module, run_config
from tests.short_runs import Job, state_of

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "bos_token_id": 97,
    "eos_token_id": 98,
}


def skipping(config: dict, clip_skip: int) -> dict:
    """The params of a model section with this clip skip."""
    changed = copy.deepcopy(config)
    changed["text_encoder"]["params"]["clip_skip"] = clip_skip
    return changed


@pytest.mark.parametrize("clip_skip", [1, 2, 3, 4])
@torch.no_grad()
def test_it_is_an_earlier_hidden_state_after_the_final_norm(clip_skip: int):
    """transformers' hidden states, counted from the last: what AUTOMATIC1111 and diffusers take."""
    torch.manual_seed(0)
    own, plain = (CLIPTextEncoder(**SIZES, max_length=16, clip_skip=n).eval() for n in (clip_skip, 1))
    for parameter in own.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    plain.load_state_dict(own.state_dict())
    reference = CLIPTextModel(CLIPTextConfig(**SIZES, max_position_embeddings=16)).eval()
    reference.load_state_dict(own.transformer["text_model"].state_dict())
    ids = torch.randint(97, (3, 16), generator=torch.Generator().manual_seed(1))
    states = reference(input_ids=ids, output_hidden_states=True).hidden_states
    wanted = reference.final_layer_norm(states[-clip_skip])
    torch.testing.assert_close(own(ids), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(plain.encode(ids, clip_skip=clip_skip).context, own(ids))
    assert torch.equal(own.encode(ids, clip_skip=1).context, plain(ids))
    assert clip_skip == 1 or not torch.allclose(own(ids), plain(ids), atol=1e-2)


def test_two_is_the_penultimate_layer_and_what_comes_after_does_not_learn():
    two, penultimate = CLIPTextEncoder(**SIZES, clip_skip=2), CLIPTextEncoder(**SIZES, layer="penultimate")
    penultimate.load_state_dict(two.state_dict())
    ids = torch.randint(97, (2, 77), generator=torch.Generator().manual_seed(1))
    assert torch.equal(two(ids), penultimate(ids))
    for encoder in (two, penultimate):
        encoder.requires_grad_(True)(ids).sum().backward()
        learning = {name for name, p in encoder.named_parameters() if p.requires_grad}
        assert learning == {name for name, p in encoder.named_parameters() if p.grad is not None}
        assert not any(".layers.3." in name for name in learning) and len(learning) > 40


@pytest.mark.parametrize("params", [{"layer": "penultimate"}, {"layer": "penultimate_hidden"}])
def test_where_the_context_is_another_layer_s_it_is_refused(params: dict):
    with pytest.raises(UserError, match=r"Clip skip is of Stable Diffusion 1.x.*\(clip_skip\)"):
        CLIPTextEncoder(**SIZES, **params, clip_skip=2)
    encoder = CLIPTextEncoder(**SIZES, **params)
    assert clip_skip_of(encoder) == 1
    with pytest.raises(UserError, match="Clip skip is of Stable Diffusion 1.x"):
        Conditioner(encoder).encode(["a"], 1, chunked=True, clip_skip=2)


@pytest.mark.parametrize("clip_skip", [0, -1, 5])
def test_layers_that_are_not_there_are_refused(clip_skip: int):
    with pytest.raises(UserError, match="Choose from 1, all layers, to 4"):
        CLIPTextEncoder(**SIZES, clip_skip=clip_skip)


def test_a_clip_skip_of_0_is_not_taken_for_none(tiny_networks: dict[str, nn.Module]):
    pipeline = Text2Image(**tiny_networks, process=DiscreteDiffusion(make_alphas_cumprod()), default_size=16)
    with pytest.raises(UserError, match="clip skip of 0 is impossible"):
        pipeline(["a red dog"], steps=1, clip_skip=0)


@torch.no_grad()
def test_a_call_s_clip_skip_is_a_model_s(tiny_config: dict, tiny_networks: dict[str, nn.Module]):
    """Pictures of a pipeline that is told so, and of one whose text encoder does so of itself."""
    process = DiscreteDiffusion(make_alphas_cumprod())
    text_encoder = instantiate(skipping(tiny_config, 2)["text_encoder"]).eval()
    text_encoder.load_state_dict(tiny_networks["text_encoder"].state_dict())
    plain, own = (
        Text2Image(**networks, process=process, default_size=16)
        for networks in (tiny_networks, tiny_networks | {"text_encoder": text_encoder})
    )

    def latents(pipeline: Text2Image, clip_skip: int | None = None) -> torch.Tensor:
        how = {"seeds": [3], "steps": 2, "clip_skip": clip_skip, "negative_prompt": "blur"}
        return pipeline(["a red dog"], **how)[0].latents

    assert torch.equal(latents(plain, 2), latents(own)) and torch.equal(latents(own, 1), latents(plain))
    assert not torch.allclose(latents(plain), latents(own), atol=1e-3)
    with pytest.raises(UserError, match="Choose from 1, all layers, to 2"):
        latents(plain, 3)


def test_a_run_trains_and_exports_with_it(job: Job, tmp_path: Path):
    """Its loss is of the earlier layer, the unused one stays as it is, and its file says how it is read."""
    plain = build_module(job.config)
    config = skipping(job.config, 2)
    module = replace(job, config=config, steps=1)(tmp_path / "run")
    last = "transformer.text_model.encoder.layers.1.mlp.fc1.weight"
    first = last.replace("layers.1", "layers.0")
    after = module.networks["text_encoder"].state_dict()
    assert torch.equal(after[last], job.weights["text_encoder"][last])
    assert not torch.equal(after[first], job.weights["text_encoder"][first])
    assert state_of(tmp_path / "run", 1)["global_step"] == 1
    plain.load_state_dict(module.state_dict())
    for prompts in (["a dog", ""], ["a red dog"]):
        assert not torch.allclose(module.condition(prompts).context, plain.condition(prompts).context)
    place = {"base": tmp_path / "base", "subject": job.subject, "name": "run"}
    given = RunConfig.parse(run_config(config, **place, trainer={"max_steps": 1}))
    path = run.export(module, given, tmp_path / "run", size=16)
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    assert about["modelspec.encoder_layer"] == "2"
    assert json.loads(about["ldm.config"])["text_encoder"]["params"]["clip_skip"] == 2
    drawn = [
        pipeline(["a red dog"], seeds=[3], steps=2, height=16, width=16)[0].latents
        for pipeline in (
            Text2Image.from_file(path),
            Text2Image(**module.networks, process=module.process, default_size=16),
        )
    ]
    torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-4, atol=1e-4)


def test_a_file_without_it_says_nothing(tiny_config: dict, tiny_networks: dict[str, nn.Module]):
    state_dicts = {name: network.state_dict() for name, network in tiny_networks.items()}
    known = {name: tiny_config[name] for name in ("unet", "vae", "text_encoder")}
    config = model_config(state_dicts, known)
    assert config["text_encoder"]["params"]["clip_skip"] == 1
    assert "modelspec.encoder_layer" not in file_metadata(config, title="x", size=16)


def test_a_folder_that_cannot_say_it_warns(
    tmp_path: Path, tiny_config: dict, tiny_networks: dict[str, nn.Module], caplog: pytest.LogCaptureFixture
):
    state_dicts = {name: network.state_dict() for name, network in tiny_networks.items()}
    tokenizer = tiny_config["text_encoder"]["params"]["tokenizer"]
    for clip_skip in (1, 2):
        config = model_config(state_dicts, skipping(tiny_config, clip_skip))
        save_folder(tmp_path / str(clip_skip), state_dicts, config=config, tokenizer=tokenizer, size=16)
        assert ("--clip_skip 2, clip_skip=1 in diffusers" in caplog.text) == (clip_skip == 2)


def test_a_picture_says_so_as_others_do(tmp_path: Path):
    settings = {"prompt": "a dog", "steps": 9, "sampler": "ddim", "seed": 1, "strength": 0.5}
    path = save_image(tmp_path / "a.png", Image.new("RGB", (8, 8)), settings | {"clip_skip": 2})
    with Image.open(path) as picture:
        assert picture.text["parameters"].endswith("Denoising strength: 0.5, Clip skip: 2")
        assert json.loads(picture.text["dreambooth"])["clip_skip"] == 2
    for unsaid in ({}, {"clip_skip": 1}):
        assert "Clip skip" not in parameters_line(settings | unsaid)
