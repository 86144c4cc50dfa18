"""Stable Diffusion XL, the base model 1.0 and its fine-tunes (Podell et al. 2023)."""

from collections.abc import Mapping
from typing import Any

import torch

from ldm.families.family import Family, Part
from ldm.families.sd.family import CLIP, HEADS, SCALE, TEXT_ENCODER, UNET, VAE
from ldm.families.shapes import autoencoder_shape, text_encoder_shape, unet_shape

TEXT_ENCODERS = "ldm.families.sdxl.text_encoder.SDXLTextEncoders"
CLIP_L = CLIP | {"layer": "penultimate_hidden"}  # the text encoder of SD 1.x, before its last layer
CLIP_G = CLIP_L | {"num_attention_heads": 20, "hidden_act": "gelu", "pad_token_id": 0}  # OpenCLIP ViT-bigG-14
ENCODER_DEFAULTS = {"clip_l": CLIP_L, "clip_g": CLIP_G}
ENCODERS = {  # key of the node -> beginning of its tensors' names in `SDXLTextEncoders`
    "clip_l": "embedders.0.",
    "clip_g": "embedders.1.",
}
SDXL = Family(
    name="Stable Diffusion XL",
    config="configs/dreambooth-sdxl.yaml",
    networks={
        "unet": Part(UNET, unet_shape, HEADS | {"num_head_channels": 64}),
        "vae": Part(VAE, autoencoder_shape, SCALE | {"scale_factor": 0.13025}),
        "text_encoder": Part(
            TEXT_ENCODERS,
            None,
            {},
            inner={
                "clip_l": (ENCODERS["clip_l"], Part(TEXT_ENCODER, text_encoder_shape, CLIP_L)),
                "clip_g": (ENCODERS["clip_g"], Part(TEXT_ENCODER, text_encoder_shape, CLIP_G)),
            },
        ),
    },
    released=(320, 2048),
    text_prefix="conditioner.",
    has_schedule=False,
    sizes={"eps": 1024, "v": 1024, "x0": 1024},
    guidance_scale=5.0,
    bucket_unit=64,  # of the training; the networks take 32
)


def vae_dtype(dtype: torch.dtype, *, is_sdxl: bool) -> torch.dtype:
    """Of a VAE beside networks of this dtype: float32 in place of float16, in which SDXL's overflows."""
    return torch.float32 if is_sdxl and dtype == torch.float16 else dtype


def encoder_params(text_encoder: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The params of each text encoder, by those of a family's text encoder node: one, or SDXL's two."""
    return [text_encoder[key]["params"] for key in ENCODERS if key in text_encoder] or [text_encoder]
