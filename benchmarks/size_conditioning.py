"""Does the crop that Stable Diffusion XL is told move the subject? A very small one is trained, and measured.

    python -m benchmarks.size_conditioning [--steps 160] [--samples 24]

Photos show a disc in the middle of a wide picture, and training sees random squares of it, with the offset of
the crop told (Podell et al. 2023, 2.2). Photos are drawn as latents; the training step, the optimizer and the
sampling are those of `LatentDiffusion` and `Text2Image`, with the two text encoders and the vector of SDXL.
Measured: how far the centroid of the disc moves where an offset is asked for in place of the left edge, over
pairs of samples with the same seed. The result is in benchmarks/real_sd.md.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.config import instantiate
from ldm.evaluation.metrics import bootstrap
from ldm.families.sdxl.conditioning import Sizes, vector_width
from ldm.optim.optimizers import build_optimizer
from ldm.pipeline import Text2Image
from ldm.training.latent_diffusion import LatentDiffusion

TOKENIZER = str(Path(__file__).resolve().parents[1] / "ldm/storybook/assets/tokenizer")
CELLS, WIDE, CELL = 12, 20, 2  # cells of a square's and a photo's side; pixels of a cell
RADIUS, DISC = 2.5, (1.5, -1.5, 1.5, -1.5)  # in cells; the disc's latents, the background's are near 0
PROMPT, BATCH = "a photo of a backpack", 32
LEFTS = (0, 4, 8)  # offsets that are asked for, in cells
SAMPLED = {"steps": 12, "guidance_scale": 1.0, "batch_size": 24}


def model_params() -> dict[str, Any]:
    """Params of a model section: 32 channels, two levels, encoders of 16 and 24."""
    text = {"vocab_size": 651, "bos_token_id": 649, "eos_token_id": 650, "tokenizer": TOKENIZER}
    text |= {"intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    text |= {"max_length": 16, "layer": "penultimate_hidden"}
    clip_l = text | {"hidden_size": 16}
    clip_g = text | {"hidden_size": 24, "projection_dim": 8, "pad_token_id": 0}
    unet = {"model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [2]}
    unet |= {"num_heads": 2, "num_groups": 8, "context_dim": 16 + 24, "adm_in_channels": vector_width(8)}
    encoder = "ldm.models.text_encoder.CLIPTextEncoder"
    encoders = {
        key: {"target": encoder, "params": own} for key, own in (("clip_l", clip_l), ("clip_g", clip_g))
    }
    vae = {"ch": 8, "ch_mult": [1, 2], "num_res_blocks": 1, "num_groups": 8}
    weighting = {"target": "ldm.training.objective.MinSNR", "params": {"gamma": 5.0, "floor": 1.0}}
    return {
        "unet": {"target": "ldm.models.unet.UNetModel", "params": unet},
        "vae": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": vae},
        "text_encoder": {
            "target": "ldm.families.sdxl.text_encoder.SDXLTextEncoders",
            "params": encoders,
        },
        "process": {"parameterization": "v", "linear_end": 0.02},
        "objective": {"weighting": weighting},
        "trainable": {"text_encoder": False, "learning_rate": 2e-3},
    }


def told(left: int) -> Sizes:
    """The numbers of a square whose left edge is so many cells from the photo's."""
    return Sizes((CELL * CELLS, CELL * WIDE), (0, CELL * left), (CELL * CELLS, CELL * CELLS))


def photos(first: int) -> dict[str, Any]:
    """A batch of random squares of photos with the numbers `first`, `first + 1`, ..."""
    draws = torch.Generator().manual_seed(first)
    lefts = torch.randint(WIDE - CELLS + 1, (BATCH,), generator=draws)
    rows = CELLS / 2 + torch.randn(BATCH, generator=draws)
    background = 0.4 * torch.randn(BATCH, 4, 1, 1, generator=draws)
    y, x = torch.arange(CELLS) + 0.5, torch.arange(CELLS) + 0.5
    columns = WIDE / 2 - lefts
    squared = (y[None, :, None] - rows[:, None, None]) ** 2 + (x[None, None] - columns[:, None, None]) ** 2
    disc = torch.tensor(DISC)[None, :, None, None]
    x0 = torch.where((squared < RADIUS**2).unsqueeze(1), disc, background.expand(-1, -1, CELLS, CELLS))
    return {
        "latent_stats": torch.cat([x0, torch.zeros_like(x0)], dim=1),
        "caption": [PROMPT] * BATCH,
        "stream": ["subject"] * BATCH,
        "item": torch.arange(first, first + BATCH),
        "sizes": torch.tensor([told(left).numbers() for left in lefts.tolist()]),
    }


def train(steps: int) -> LatentDiffusion:
    torch.manual_seed(0)
    target = f"{LatentDiffusion.__module__}.{LatentDiffusion.__name__}"
    module: LatentDiffusion = instantiate({"target": target, "params": model_params()})
    optimizer = build_optimizer(module.trainable.param_groups(module.networks))
    for step in range(steps):
        loss = module.loss_per_item(photos(step * BATCH)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return module


def centroid(latents: Tensor) -> float:
    """The mean column of the disc in [4, h, w], in cells from the left."""
    disc = torch.tensor(DISC)
    likeness = torch.einsum("c,chw->hw", disc, latents.float()) / disc.square().sum()  # 1 on the disc
    weights = (likeness - 0.5).clamp(min=0).sum(0)
    return float((weights * (torch.arange(len(weights)) + 0.5)).sum() / weights.sum())


def measure(module: LatentDiffusion, *, samples: int) -> list[dict[str, Any]]:
    """For each offset: the column, and its distance from that at the left edge with a 95 % interval."""
    pipeline = Text2Image(**module.networks, process=module.process, default_size=CELL * CELLS)
    columns = {}
    for left in LEFTS:
        drawn = pipeline(PROMPT, seeds=range(samples), sizes=told(left), **SAMPLED)
        columns[left] = torch.tensor([centroid(one.latents) for one in drawn], dtype=torch.float64)
    rows = []
    for left, own in columns.items():
        apart = own - columns[LEFTS[0]]
        row = {"left": left, "column": round(float(own.mean()), 2), "trained": WIDE / 2 - left}
        rows.append(row | {"shift": round(float(apart.mean()), 2), "interval": list(bootstrap(apart))})
    return rows


def main(words: Sequence[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=160, help="of training (160)")
    parser.add_argument("--samples", type=int, default=24, help="at each offset (24)")
    options = parser.parse_args(words)
    for row in measure(train(options.steps), samples=options.samples):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
