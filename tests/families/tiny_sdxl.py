"""A tiny Stable Diffusion XL of diffusers' own classes, with random weights, and trainings of it."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ldm.checkpoints.load import init_on_meta, load_state_dicts, open_model
from ldm.config import instantiate
from tests import factories

SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LENGTH = 16  # tokens of a prompt
PARTS = ("unet", "vae", "text_encoder")


def filled(network: nn.Module) -> nn.Module:
    """No layer left at zero or one, where it would hide mistakes."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return network.eval()


def pipeline(tokenizer: Path) -> StableDiffusionXLPipeline:
    """Three levels of 16 to 64 channels, two encoders of 24 and 32, a projection to 20; 2 pixels a cell."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return StableDiffusionXLPipeline(
            unet=filled(_unet()),
            vae=filled(_vae()),
            text_encoder=filled(CLIPTextModel(_text(tokenizer, 24, 3, "quick_gelu"))),
            text_encoder_2=filled(
                CLIPTextModelWithProjection(_text(tokenizer, 32, 4, "gelu", projection_dim=20))
            ),
            tokenizer=CLIPTokenizer.from_pretrained(
                tokenizer, model_max_length=LENGTH, pad_token="<|endoftext|>"
            ),
            tokenizer_2=CLIPTokenizer.from_pretrained(tokenizer, model_max_length=LENGTH, pad_token="!"),
            scheduler=EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading", steps_offset=1),
            add_watermarker=False,
        )


def saved(pipe: StableDiffusionXLPipeline, folder: Path, tokenizer: Path) -> Path:
    """As diffusers saves it, with the vocabulary files that released folders hold."""
    pipe.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        for own in ("tokenizer", "tokenizer_2"):
            (folder / own / name).write_bytes((tokenizer / name).read_bytes())
    return folder


def networks(path: Path) -> dict[str, nn.Module]:
    """Ours, of a file or folder."""
    model = open_model(path)
    with init_on_meta():
        built = {name: instantiate(model.config[name]) for name in PARTS}
    load_state_dicts(built, model.state_dicts)
    return {name: network.eval() for name, network in built.items()}


def model_section(path: Path) -> dict[str, Any]:
    """The params of a model section for a file or folder, each said."""
    known = dict(open_model(path).config)
    return {name: known.pop(name) for name in PARTS} | {"process": known}


def run_config(base: Path, subject: Path, *, name: str, **sections: Any) -> dict[str, Any]:
    """The config of a DreamBooth run of it on a CPU: photos of several sizes, prior images, the teacher."""
    learning = {"trainable": {"learning_rate": 1e-3}, "objective": {"prior_target": "teacher"}}
    data = {"crop": "random", "num_priors": 2, "prior_caption_dropout": 0.5, "validation_batches": 1}
    own = {"data": {"params": data}, "trainer": {"val_check_interval": 1}}
    own |= {"samples": {"prompts": ["a photo of {identifier}"], "n": 1}}
    model = model_section(base) | learning
    config = factories.run_config(model, base=base, subject=subject, name=name, **own)
    return OmegaConf.to_container(OmegaConf.merge(config, {"model": {"params": learning}}, sections))


def relative_error(ours: Tensor, reference: Tensor) -> float:
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def _unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=[16, 32, 64],
        layers_per_block=1,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        transformer_layers_per_block=[1, 2, 3],
        attention_head_dim=[2, 4, 8],  # numbers of heads
        norm_num_groups=8,
        cross_attention_dim=24 + 32,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=20 + 6 * 256,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=32,
        block_out_channels=[16, 32],
        layers_per_block=1,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=8,
        scaling_factor=0.13025,
    )


def _text(tokenizer: Path, width: int, layers: int, act: str, **more: int) -> CLIPTextConfig:
    tokens = len(json.loads((tokenizer / "vocab.json").read_text()))
    return CLIPTextConfig(
        vocab_size=tokens,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        hidden_act=act,
        max_position_embeddings=LENGTH,
        bos_token_id=tokens - 2,
        eos_token_id=tokens - 1,
        **more,
    )
