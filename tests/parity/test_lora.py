"""LoRA files against diffusers: what `load_lora_weights` makes of ours is the same network and picture."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ldm.checkpoints.load import open_model
from ldm.checkpoints.lora import read_lora, save_lora
from ldm.checkpoints.save_folder import save_folder
from ldm.commands import convert
from ldm.errors import UserError
from ldm.models.lora import LoRA
from ldm.pipeline import Text2Image
from ldm.randomness import randn
from ldm.runs import sample_images

KINDS = {
    "unet": ["attention", "feed_forward", "projections", "convolutions"],
    "text_encoder": ["attention", "feed_forward"],
}
PROMPT, SETTINGS = "a photo of sks disc", {"steps": 4, "height": 16, "width": 16, "guidance_scale": 3.0}


@pytest.fixture
def lora(tiny_networks: dict[str, nn.Module]) -> LoRA:
    """Of every kind of layer, of rank 4 and alpha 2, far from its start."""
    lora = LoRA(rank=4, alpha=2.0, **KINDS)
    lora.attach({name: tiny_networks[name] for name in ("unet", "text_encoder")})
    torch.manual_seed(2)
    for parameter in lora.parameters():
        nn.init.normal_(parameter, std=0.15)
    return lora


def drawn_by_diffusers(folder: Path, lora: Path | None = None) -> np.ndarray:
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        pipe.load_lora_weights(lora.parent, weight_name=lora.name)
    x = randn((4, 8, 8), seed=5, items=[0], purpose="sample/x_T")
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 16, "width": 16, "latents": x}
    return np.asarray(pipe(PROMPT, **options).images[0]).astype(int)


def drawn(t2i: Text2Image) -> np.ndarray:
    return np.asarray(t2i([PROMPT], seeds=[5], **SETTINGS)[0].image).astype(int)


@pytest.mark.parametrize("style", ["kohya", "peft"])
def test_diffusers_draws_the_same_picture(
    style: str, tiny_model_file: Path, lora: LoRA, tiny_tokenizer: Path, tmp_path: Path
):
    model = open_model(tiny_model_file)
    folder = save_folder(
        tmp_path / "folder", model.state_dicts, config=model.config, tokenizer=tiny_tokenizer, size=16
    )
    file = save_lora(
        tmp_path / "disc.safetensors", lora.weights(), model.state_dicts, style=style, dtype=torch.float32
    )
    ours = drawn(Text2Image.from_file(tiny_model_file, loras=[(file, 1.0)]))
    theirs, untouched = drawn_by_diffusers(folder, file), drawn_by_diffusers(folder)
    assert abs(drawn(Text2Image.from_file(tiny_model_file)) - untouched).max() <= 1
    assert abs(ours - theirs).max() <= 1
    assert abs(ours - untouched).mean() > 4  # levels of 255


@pytest.mark.parametrize("style", ["kohya", "peft"])
def test_a_file_gives_its_factors_back(style: str, tiny_model_file: Path, lora: LoRA, tmp_path: Path):
    parts = open_model(tiny_model_file).state_dicts
    file = save_lora(tmp_path / "a.safetensors", lora.weights(), parts, style=style, dtype=torch.float32)
    again = read_lora(file, parts)
    for part, layers in lora.weights().items():
        assert again[part].keys() == layers.keys() and layers
        for name, (down, up, alpha) in layers.items():
            found_down, found_up, found = again[part][name]
            assert torch.equal(found_down, down)
            torch.testing.assert_close(found_up * found, up * alpha)
    with safe_open(file, "pt") as opened:
        assert ("ss_network_dim" in opened.metadata()) == (style == "kohya")


def test_names_are_those_of_released_files(tiny_model_file: Path, lora: LoRA, tmp_path: Path):
    parts = open_model(tiny_model_file).state_dicts
    kohya, peft = (
        set(load_file(save_lora(tmp_path / f"{style}.safetensors", lora.weights(), parts, style=style)))
        for style in ("kohya", "peft")
    )
    layer = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    text = "text_model_encoder_layers_1_self_attn_q_proj"
    for prefix in (f"lora_unet_{layer}", f"lora_te_{text}", "lora_unet_mid_block_attentions_0_proj_in"):
        assert {f"{prefix}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")} <= kohya
    text = "text_encoder.text_model.encoder.layers.1.self_attn.q_proj"
    for prefix in ("unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", text):
        assert {f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"} <= peft


def test_a1111_lists_it_under_its_base_s_family(
    tiny_config: dict, lora: LoRA, tiny_model_file: Path, tmp_path: Path
):
    """It reads `ss_v2`, and the name to call it by from `ss_output_name`, else the file's."""
    for linear, version in ((False, "sd_v1"), (True, "sd_v2_v")):
        parts = dict(open_model(tiny_model_file).state_dicts)
        ends = ("proj_in.weight", "proj_out.weight")
        flat = {n: x.flatten(1) if linear and n.endswith(ends) else x for n, x in parts["unet"].items()}
        about = {"modelspec.prediction_type": "v", "ldm.config": "{}"}
        layers = {"unet": {n: w for n, w in lora.weights()["unet"].items() if n.endswith("to_q")}}
        file = save_lora(tmp_path / "rex.safetensors", layers, parts | {"unet": flat}, metadata=about)
        with safe_open(file, "pt") as opened:
            said = opened.metadata()
        assert said["ss_v2"] == str(linear) and said["ss_base_model_version"] == version
        assert said["ss_output_name"] == "rex" and said["ss_network_module"] == "networks.lora"


def test_merged_into_a_model_it_draws_the_same(
    tiny_model_file: Path, lora: LoRA, tmp_path: Path, tiny_networks: dict[str, nn.Module]
):
    parts = open_model(tiny_model_file).state_dicts
    file = save_lora(tmp_path / "a.safetensors", lora.weights(), parts, dtype=torch.float32)
    target = tmp_path / "merged.safetensors"
    words = [tiny_model_file, target, "--lora", file, "--lora_weight", 0.5]
    convert.main(convert.parse([str(word) for word in words]))
    half = drawn(Text2Image.from_file(tiny_model_file, loras=[sample_images.weighted(f"{file}:0.5")]))
    assert np.array_equal(drawn(Text2Image.from_file(target)), half)
    twice = Text2Image.from_file(tiny_model_file, loras=[(file, 0.25), (file, 0.25)])
    assert abs(drawn(twice) - half).max() <= 1
    assert sample_images.weighted("C:/a.safetensors") == (Path("C:/a.safetensors"), 1.0)


def test_what_does_not_fit_is_named(tiny_model_file: Path, lora: LoRA, tmp_path: Path):
    parts = open_model(tiny_model_file).state_dicts
    file = save_lora(tmp_path / "a.safetensors", lora.weights(), parts)
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("attn2_to_k.lora_down.weight"))
    spoilt = {
        "a DoRA": {"lora_unet_mid_block_attentions_0_proj_in.dora_scale": torch.ones(2)},
        "to_k": {name: torch.zeros(4, 5)},
    }
    for word, change in spoilt.items():
        save_file(tensors | change, tmp_path / "spoilt.safetensors")
        with pytest.raises(UserError, match=word):
            read_lora(tmp_path / "spoilt.safetensors", parts)
    del tensors[name]
    save_file(tensors, tmp_path / "spoilt.safetensors")
    with pytest.raises(UserError, match="no down matrix"):
        read_lora(tmp_path / "spoilt.safetensors", parts)
