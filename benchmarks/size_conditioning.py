"""Does the crop that Stable Diffusion XL is told move the subject? A small one is trained, and measured.

    python -m benchmarks.size_conditioning FOLDER [--steps 400] [--samples 32]

Photos show one individual of the storybook in the middle of a wide picture, of which training sees random
squares, with the crop's offset told (Podell et al. 2023, 2.2). The base is the storybook's own UNet with a second
text encoder and the vector's layers added, so that it computes what it did. Training is main.py's, sampling the
pipeline's. Measured: how far the subject's centroid moves, in pixels, where an offset is asked for in place of
the left edge, over pairs of samples with the same seed; the result is in benchmarks/real_sd.md.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoints.load import open_model
from ldm.checkpoints.save import save_model
from ldm.config import instantiate
from ldm.evaluation.metrics import bootstrap
from ldm.families.sdxl.conditioning import Sizes, vector_width
from ldm.pipeline import Text2Image
from ldm.runs.job import run_job
from ldm.schema import RunConfig
from ldm.storybook.subjects import SUBJECTS
from ldm.storybook.world import draw, same_subject

ASSETS = Path(__file__).resolve().parents[1] / "ldm/storybook/assets"
SUBJECT, PLACES = SUBJECTS["backpack"], ("beach", "snow", "forest", "grass", "desert", "moon")
PHOTOS, SIZE, MARGIN = 48, 64, 16  # pixels of training; a margin on each side
PROMPT = "a photo of sks backpack"
POOLED, WIDTH = 16, 32  # of the second text encoder
LEFTS = (0, 16, 32)  # crop offsets that are asked for
SAMPLED = {"steps": 16, "guidance_scale": 1.0, "batch_size": 16}


def write_photos(folder: Path) -> None:
    """PHOTOS pictures, 96 x 64 at four times the size: the drawing, its left and right edges drawn out."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(PHOTOS):
        scene = same_subject(SUBJECT, context=PLACES[i % len(PLACES)], seed=SUBJECT.seed + i)
        pixels = np.asarray(draw(scene, size=4 * SIZE))
        wide = np.pad(pixels, ((0, 0), (4 * MARGIN, 4 * MARGIN), (0, 0)), mode="edge")
        Image.fromarray(wide).save(folder / f"{i:02d}.png")


def base_config() -> dict[str, Any]:
    """Params of a model section: the storybook's networks, a second text encoder, and the vector's layers."""
    book = open_model(ASSETS / "base.safetensors").config
    first = book["text_encoder"]["params"]
    second = first | {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2}
    second |= {"num_attention_heads": 2, "projection_dim": POOLED, "layer": "penultimate_hidden"}
    second |= {"pad_token_id": 0}
    target = book["text_encoder"]["target"]
    unet = book["unet"]["params"] | {
        "context_dim": first["hidden_size"] + WIDTH,
        "adm_in_channels": vector_width(POOLED),
    }
    process = {key: value for key, value in book.items() if key not in ("unet", "vae", "text_encoder")}
    return {
        "unet": book["unet"] | {"params": unet},
        "vae": book["vae"],
        "text_encoder": {
            "target": "ldm.families.sdxl.text_encoder.SDXLTextEncoders",
            "params": {
                "clip_l": {"target": target, "params": first},
                "clip_g": {"target": target, "params": second},
            },
        },
        "process": process,
    }


def write_base(path: Path, config: dict[str, Any]) -> None:
    """The storybook's weights in these networks: what is added changes no prediction."""
    torch.manual_seed(0)
    networks = {name: instantiate(config[name]) for name in ("unet", "vae", "text_encoder")}
    book = open_model(ASSETS / "base.safetensors").state_dicts
    networks["vae"].load_state_dict(dict(book["vae"]))
    networks["text_encoder"].clip_l.load_state_dict(dict(book["text_encoder"]))
    unet = networks["unet"].state_dict()
    for name, own in unet.items():
        if name in book["unet"]:
            own.copy_(_widened(book["unet"][name], own))
        elif name.startswith("label_emb.0.2."):
            own.zero_()
    state_dicts = {name: network.state_dict() for name, network in networks.items()}
    save_model(path, state_dicts, alphas_cumprod=None, metadata={"modelspec.prediction_type": "v"})


def _widened(tensor: Tensor, like: Tensor) -> Tensor:
    """With zeros for the context of the second text encoder."""
    wide = torch.zeros_like(like)
    wide[tuple(slice(n) for n in tensor.shape)] = tensor
    return wide


def train(folder: Path, *, steps: int) -> Path:
    """The model file of a run of main.py on the photos, with random crops and nothing else of note."""
    config = base_config()
    write_base(folder / "base.safetensors", config)
    write_photos(folder / "photos")
    learning = {
        "trainable": {"text_encoder": False, "learning_rate": 1e-3},
        "lr_schedule": {"target": "ldm.optim.schedules.Cosine", "params": {"warmup_steps": 20}},
        "objective": {
            "weighting": {
                "target": "ldm.training.objective.MinSNR",
                "params": {"gamma": 5.0, "floor": 1.0},
            }
        },
    }
    data = {
        "subject_root": str(folder / "photos"),
        "class_word": "backpack",
        "size": SIZE,
        "batch_size": 8,
        "num_priors": 0,
        "crop": "random",
        "crop_variants": 8,
        "flip": False,
        "validation_batches": 0,
    }
    run = {
        "name": "size-conditioning",
        "seed": 23,
        "base_checkpoint": str(folder / "base.safetensors"),
        "checkpoint_every": steps,
        "model": {"target": "ldm.training.latent_diffusion.LatentDiffusion", "params": config | learning},
        "data": {"target": "ldm.data.dreambooth.DreamBoothDataModule", "params": data},
        "trainer": {"max_steps": steps, "accelerator": "cpu", "gradient_clip_val": 1.0},
        "samples": {"prompts": [PROMPT], "n": 1, "steps": 10},
        "export": {"dtype": "fp32"},
    }
    run_job(RunConfig.parse(run))
    return Path("logs/size-conditioning/model.safetensors")


def centroid(image: Image.Image) -> float:
    """The mean column of what is purple, as the subject is and no place: pixels from the left."""
    red, green, blue = np.asarray(image.convert("RGB"), float).transpose(2, 0, 1)
    purple = (np.minimum(red, blue) - green - 25).clip(0)
    return float((purple.sum(0) * np.arange(image.width)).sum() / purple.sum())


def measure(model: Path, *, samples: int) -> list[dict[str, float | list[float]]]:
    """For each offset: the centroid, and its distance from that of the left edge with a 95 % interval."""
    pipeline, found = Text2Image.from_file(model), {}
    for left in LEFTS:
        sizes = Sizes((4 * SIZE, 4 * (SIZE + 2 * MARGIN)), (0, left), (SIZE, SIZE))
        drawn = pipeline(PROMPT, seeds=range(samples), sizes=sizes, **SAMPLED)
        found[left] = torch.tensor([centroid(one.image) for one in drawn], dtype=torch.float64)
    rows = []
    for left, columns in found.items():
        apart = columns - found[0]
        row = {"left": left, "column": float(columns.mean()), "shift": float(apart.mean())}
        rows.append(row | {"interval": list(bootstrap(apart))})
    return rows


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="gets the photos and the base")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--samples", type=int, default=32, help="at each offset")
    options = parser.parse_args(words)
    model = train(options.folder, steps=options.steps)
    for row in measure(model, samples=options.samples):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
