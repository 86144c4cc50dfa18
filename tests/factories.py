"""Tiny networks, photos and configs of runs, of which the fixtures of conftest.py are made."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from PIL import Image, ImageDraw
from torch import nn

from ldm.annotations import Node
from ldm.config import instantiate
from ldm.optim.optimizer_nodes import FUSED_BACKWARD, OptimizerNode
from ldm.training.latent_diffusion import LatentDiffusion


def lean(optimizer: OptimizerNode) -> Node:
    """The node of a fused backward pass."""
    return {"target": FUSED_BACKWARD, "params": {"optimizer": optimizer}}


SCHEDULE = {"beta_schedule": "scaled_linear", "linear_start": 0.00085, "linear_end": 0.012, "timesteps": 1000}
MIN_SNR = {"target": "ldm.training.objective.MinSNR", "params": {"gamma": 5.0}}
LEAN = lean("adamw")
LEAN_BF16 = lean("adamw_bf16")
LORA = "model.params.trainable.lora={target: ldm.models.lora.LoRA, params: {rank: 2}}"  # of a command line
DORA = "model.params.trainable.adapter={kind: dora, rank: 2}"
TAUGHT = {"objective": {"prior_target": "teacher"}}


def model_config(tokenizer: Path) -> dict[str, Any]:
    """Params of a model section: networks of 32 channels and 2 levels, latents half as wide as pictures."""
    tokens = 2 * (127 - 33) + 2
    return {
        "unet": {
            "target": "ldm.models.unet.UNetModel",
            "params": {
                "model_channels": 32,
                "channel_mult": [1, 2],
                "num_res_blocks": 1,
                "attention_resolutions": [1, 2],
                "num_heads": 4,
                "context_dim": 32,
            },
        },
        "vae": {
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1},
        },
        "text_encoder": {
            "target": "ldm.models.text_encoder.CLIPTextEncoder",
            "params": {
                "vocab_size": tokens,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "max_length": 32,
                "tokenizer": str(tokenizer),
                "bos_token_id": tokens - 2,
                "eos_token_id": tokens - 1,
            },
        },
        "process": {"parameterization": "eps", **SCHEDULE},
    }


def networks(config: dict[str, Any]) -> dict[str, nn.Module]:
    """Fresh networks of `model_config`, the same weights every time: {"unet", "vae", "text_encoder"}."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = {part: instantiate(config[part]) for part in ("unet", "vae", "text_encoder")}
        for parameter in built["unet"].parameters():  # SD starts some layers at zero, which hides mistakes
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    return {part: network.eval() for part, network in built.items()}


def photos(folder: Path) -> Path:
    """Four photos of one red disc in a new folder, of several sizes and formats."""
    folder.mkdir()
    for k, (size, suffix) in enumerate(
        [((40, 24), "png"), ((24, 40), "jpg"), ((32, 32), "png"), ((64, 48), "webp")]
    ):
        photo = Image.new("RGB", size, (40 * k, 160, 200))
        ImageDraw.Draw(photo).ellipse((4 + k, 4, 18 + k, 18), fill=(200, 30, 30))
        photo.save(folder / f"{k}.{suffix}")
    return folder


def masks(folder: Path) -> Path:
    """A mask beside each of `photos`: the disc's."""
    sizes = [(40, 24), (24, 40), (32, 32), (64, 48)]
    for k, size in enumerate(sizes):
        mask = Image.new("L", size)
        ImageDraw.Draw(mask).ellipse((4 + k, 4, 18 + k, 18), fill=255)
        mask.save(folder / f"{k}.mask.png")
    return folder


def run_config(
    model: dict[str, Any], *, base: Path, subject: Path, name: str, **sections: Any
) -> dict[str, Any]:
    """The config of a DreamBooth run on a CPU; `sections` add keys, or replace those that are there."""
    config = {
        "name": name,
        "seed": 5,
        "base_checkpoint": str(base),
        "model": {
            "target": "ldm.training.latent_diffusion.LatentDiffusion",
            "params": model | {"trainable": {"learning_rate": 1e-3}},
        },
        "data": {
            "target": "ldm.data.dreambooth.DreamBoothDataModule",
            "params": {
                "subject_root": str(subject),
                "class_word": "disc",
                "size": 16,
                "batch_size": 2,
                "num_priors": 3,
            },
        },
        "priors": {"steps": 2, "guidance_scale": 2.0},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1},
        "samples": {"prompts": ["a photo of {identifier} {class_word}"], "steps": 2},
        "export": {"dtype": "fp32"},
    }
    return OmegaConf.to_container(OmegaConf.merge(config, sections))


def with_concepts(path: str, second: Path) -> str:
    """Writes a config to be merged after the one at `path`: two concepts and a style -> its name."""
    first = OmegaConf.load(path).data.params.subject_root
    concepts = [
        {"root": first, "identifier": "sks", "class_word": "disc"},
        {"root": str(second), "identifier": "zwx", "class_word": "ring"},
        {"root": str(second), "identifier": "qpv", "class_word": None, "weight": 2, "name": "style"},
    ]
    params = dict.fromkeys(("subject_root", "class_word", "identifier")) | {"concepts": concepts}
    OmegaConf.save(OmegaConf.create({"data": {"params": params}}), "concepts.yaml")
    return "concepts.yaml"


def build_module(
    params: Mapping[str, Any], kind: type[LatentDiffusion] = LatentDiffusion, **more: Any
) -> LatentDiffusion:
    """params: of a model section, such as the fixture `tiny_config`; more: those that differ."""
    return instantiate({"target": f"{kind.__module__}.{kind.__name__}", "params": {**params, **more}})
