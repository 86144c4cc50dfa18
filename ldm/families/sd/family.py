"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022)."""

from ldm.families.family import Family, Part
from ldm.families.shapes import autoencoder_shape, text_encoder_shape, unet_shape

UNET = "ldm.models.unet.UNetModel"
VAE = "ldm.models.autoencoder.AutoencoderKL"
TEXT_ENCODER = "ldm.models.text_encoder.CLIPTextEncoder"
CLIP = {  # params of CLIP's text encoder ViT-L/14 that shapes do not determine
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "layer": "last",
    "clip_skip": 1,
    "tokenizer": "openai/clip-vit-large-patch14",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": None,
}
HEADS = {"num_heads": 8, "num_head_channels": None, "num_groups": 32}
SCALE = {"scale_factor": 0.18215, "num_groups": 32}
OPENCLIP = {"num_attention_heads": 16, "hidden_act": "gelu", "layer": "penultimate", "pad_token_id": 0}

SD1 = Family(
    name="Stable Diffusion 1.x",
    config="configs/dreambooth-sd1.yaml",
    networks={
        "unet": Part(UNET, unet_shape, HEADS),
        "vae": Part(VAE, autoencoder_shape, SCALE),
        "text_encoder": Part(TEXT_ENCODER, text_encoder_shape, CLIP),
    },
    released=(320, 768),
    text_prefix="cond_stage_model.",
    has_schedule=True,
    sizes={"eps": 512, "v": 512, "x0": 512},
    guidance_scale=7.5,
    bucket_unit=64,
)
SD2 = Family(
    name="Stable Diffusion 2.x",
    config="configs/dreambooth-sd2.yaml",
    networks={
        "unet": Part(UNET, unet_shape, HEADS | {"num_head_channels": 64}),
        "vae": Part(VAE, autoencoder_shape, SCALE),
        "text_encoder": Part(TEXT_ENCODER, text_encoder_shape, CLIP | OPENCLIP),
    },
    released=(320, 1024),
    text_prefix="cond_stage_model.",
    has_schedule=True,
    sizes={"eps": 512, "v": 768, "x0": 512},
    guidance_scale=7.5,
    bucket_unit=64,
)
