"""SDXL at its true size with random weights, one side at a time: parity of a prediction, loading's peak.

    pytest -m slow -s tests/families/test_sdxl_true_size_slow.py

Weights lie on the disk in bfloat16, 7 GB, and are computed with in float32: 11 GiB of memory at most.
"""

import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ldm.checkpoints.load import init_on_meta, load_state_dicts, open_model
from ldm.commands import convert
from ldm.config import instantiate
from ldm.families.sdxl.conditioning import size_vector
from ldm.models.conditioning import Conditioning
from tests.families import sdxl_base, tiny_sdxl
from tests.families.tiny_sdxl import relative_error
from tests.parity.test_true_size import LOAD

pytestmark = pytest.mark.slow
TOLERANCE = 1e-4  # of the largest output, float32
SIZES = torch.tensor([[1003.0, 3003, 5, 9, 256, 320]])
UNET = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE = {
    "sample_size": 1024,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "scaling_factor": 0.13025,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
IDS = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    **{name: ["diffusers", ""] for name in ("unet", "vae", "scheduler")},
    **{name: ["transformers", ""] for name in ("text_encoder", "text_encoder_2")},
}


@contextmanager
def made_in_bfloat16() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """diffusers' and transformers' networks with the weights they begin with, made and saved one by one."""
    folder = tmp_path_factory.mktemp("true") / "diffusers"
    torch.manual_seed(0)
    clip_l = CLIPTextConfig(**IDS, **CLIP_L, hidden_act="quick_gelu")
    clip_g = CLIPTextConfig(**IDS, **CLIP_G, hidden_act="gelu", projection_dim=1280)
    make = {
        "unet": lambda: UNet2DConditionModel(**UNET),
        "vae": lambda: AutoencoderKL(**VAE),
        "text_encoder": lambda: CLIPTextModel(clip_l),
        "text_encoder_2": lambda: CLIPTextModelWithProjection(clip_g),
    }
    with made_in_bfloat16():
        for name, build in make.items():
            build().save_pretrained(folder / name, max_shard_size="20GB")
            gc.collect()
    scheduler = EulerDiscreteScheduler(**tiny_sdxl.SCHEDULE, timestep_spacing="leading", steps_offset=1)
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    return folder


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Token ids of both encoders, noisy latents that are not square, a timestep."""
    draws = torch.Generator().manual_seed(1)
    ids = torch.randint(49406, (1, 2, 77), generator=draws)
    ids[..., 0], ids[..., 20:] = 49406, 49407
    ids[:, 1, 21:] = 0
    return ids, torch.randn(1, 4, 32, 40, generator=draws), torch.tensor([501])


@torch.no_grad()
def computed_there(folder: Path) -> dict[str, Tensor]:
    """By one network after the other."""
    ids, x, t = inputs()
    how = {"dtype": torch.float32}
    first = CLIPTextModel.from_pretrained(folder / "text_encoder", **how)
    hidden = [first(ids[:, 0], output_hidden_states=True).hidden_states[-2]]
    second = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", **how)
    encoded = second(ids[:, 1], output_hidden_states=True)
    context, pooled = torch.cat([*hidden, encoded.hidden_states[-2]], dim=2), encoded.text_embeds
    del first, second
    gc.collect()
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    added = {"text_embeds": pooled, "time_ids": SIZES}
    prediction = unet(x, t, context, added_cond_kwargs=added).sample
    return {"context": context, "pooled": pooled, "prediction": prediction}


@torch.no_grad()
def computed_here(folder: Path) -> dict[str, Tensor]:
    model, (ids, x, t) = open_model(folder), inputs()

    def loaded(name: str) -> torch.nn.Module:
        with init_on_meta():
            network = instantiate(model.config[name])
        load_state_dicts({name: network}, model.state_dicts)
        return network.eval()

    context, pooled = loaded("text_encoder")(ids)
    gc.collect()
    told = Conditioning(context, vector=size_vector(pooled, SIZES))
    return {"context": context, "pooled": pooled, "prediction": loaded("unet").predict(x, t, told)}


def test_one_prediction_equals_diffusers(folder: Path):
    found = {}
    for side, compute in (("diffusers", computed_there), ("ours", computed_here)):
        start = time.perf_counter()
        found[side] = compute(folder)
        gc.collect()
        print(f"{side}: {time.perf_counter() - start:.0f} s")
    errors = {name: relative_error(found["ours"][name], found["diffusers"][name]) for name in found["ours"]}
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) <= TOLERANCE


def test_the_file_is_the_released_one_s_and_loading_takes_little_more_than_the_model(folder: Path):
    file = convert.main(convert.parse([str(folder), str(folder.with_name("xl.safetensors"))]))
    gc.collect()
    with safe_open(file, framework="pt") as opened:
        names = set(opened.keys())
    assert names | {"conditioner.embedders.1.model.logit_scale"} == sdxl_base.names()  # folders lack it
    words = [sys.executable, "-c", LOAD, str(file), "bfloat16"]
    ended = subprocess.run(words, check=True, capture_output=True, text=True)
    seconds, share = map(float, ended.stdout.split())
    print(f"{file.stat().st_size / 1e9:.2f} GB as bfloat16: {seconds:.1f} s, {share:.3f} of the model")
    assert share <= 1.2
