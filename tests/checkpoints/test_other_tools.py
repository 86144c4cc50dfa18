"""A true-size export against the rules by which other programs recognize and open Stable Diffusion 1.x files.

The rules are those of the loaders that AUTOMATIC1111, ComfyUI, kohya and diffusers publish.
"""

import pytest
import torch
from torch import Tensor

from ldm.checkpoints.layout import join
from ldm.config import instantiate
from ldm.diffusion.schedule import make_alphas_cumprod

UNET, TEXT, VAE = "model.diffusion_model.", "cond_stage_model.transformer.text_model.", "first_stage_model."
FIRST_ATTENTION = UNET + "input_blocks.1.1."


@pytest.fixture(scope="module")
def file() -> dict[str, Tensor]:
    """Name -> tensor of the file that this project writes of SD 1.x; networks on meta: shapes, no values."""
    targets = {
        "unet": "ldm.models.unet.UNetModel",
        "vae": "ldm.models.autoencoder.AutoencoderKL",
        "text_encoder": "ldm.models.text_encoder.CLIPTextEncoder",
    }
    with torch.device("meta"):
        parts = {part: instantiate({"target": target}).state_dict() for part, target in targets.items()}
    alphas_cumprod = make_alphas_cumprod(
        beta_schedule="scaled_linear", linear_start=0.00085, linear_end=0.012, timesteps=1000
    )
    return join(parts, alphas_cumprod)


def test_web_ui_finds_the_text_encoder_under_its_full_name(file):
    short = ("embeddings.", "encoder.", "final_layer_norm.")
    assert not any(name.startswith(f"cond_stage_model.transformer.{s}") for name in file for s in short)
    assert file[TEXT + "embeddings.token_embedding.weight"].shape == (49408, 768)
    assert file["alphas_cumprod"].shape == (1000,) and file["alphas_cumprod"].dtype == torch.float32


def test_comfyui_takes_it_for_sd_1(file):
    """It reads the kind of model off the UNet: width, context, projections that are convolutions."""
    assert file[UNET + "input_blocks.0.0.weight"].shape == (320, 4, 3, 3)
    assert file[FIRST_ATTENTION + "transformer_blocks.0.attn2.to_k.weight"].shape[1] == 768
    assert file[FIRST_ATTENTION + "proj_in.weight"].dim() == 4
    assert UNET + "label_emb.0.0.weight" not in file  # SDXL has it
    depth = {name.split(".")[6] for name in file if name.startswith(FIRST_ATTENTION + "transformer_blocks.")}
    assert depth == {"0"}
    blocks = {
        int(name.removeprefix(UNET + "input_blocks.").split(".")[0]) for name in file if "input_bl" in name
    }
    assert blocks == set(range(12))
    assert file[TEXT + "embeddings.position_ids"].dtype == torch.int64
    assert file[TEXT + "embeddings.position_ids"].tolist() == [list(range(77))]


def test_kohya_s_strict_loaders_get_all_and_no_more(file):
    """The text encoder has 197 names, the VAE's attention is made of convolutions."""
    text = {name.removeprefix(TEXT) for name in file if name.startswith(TEXT)}
    ends = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
    layers = [*ends, "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]
    wanted = {
        f"encoder.layers.{n}.{layer}.{w}" for n in range(12) for layer in layers for w in ("weight", "bias")
    }
    wanted |= {"final_layer_norm.weight", "final_layer_norm.bias", "embeddings.position_ids"}
    wanted |= {"embeddings.token_embedding.weight", "embeddings.position_embedding.weight"}
    assert text == wanted and len(text) == 197
    for half in ("encoder", "decoder"):
        for name in ("q", "k", "v", "proj_out"):
            assert file[f"{VAE}{half}.mid.attn_1.{name}.weight"].shape == (512, 512, 1, 1)
    prefixes = (UNET, TEXT, VAE)
    assert sum(name.startswith(prefixes) for name in file) == 1143 - 12


def test_diffusers_takes_it_for_sd_1(file):
    """`from_single_file` tells versions apart by the context of a layer, inpainting by the input."""
    key = UNET + "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
    assert file[key].shape[-1] == 768
    assert "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight" not in file  # SD 2
    assert file[UNET + "input_blocks.0.0.weight"].shape[1] == 4
