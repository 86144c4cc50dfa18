"""The tiny model in diffusers, and one prediction of it by both: with an adapter or without."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from ldm.checkpoints.load import open_model
from ldm.checkpoints.save_folder import save_folder
from ldm.model_file import ModelFile
from ldm.models.conditioning import Conditioning

TOLERANCE = 1e-5  # of the largest output, float32
PROMPT = "a photo of sks disc"


@pytest.fixture
def pipe(tiny_model_file: Path, tiny_tokenizer: Path, tmp_path: Path) -> StableDiffusionPipeline:
    """The tiny model in diffusers."""
    model = open_model(tiny_model_file)
    how = {"config": model.config, "tokenizer": tiny_tokenizer, "size": 16}
    folder = save_folder(tmp_path / "diffusers", model.state_dicts, **how)
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


@torch.no_grad()
def theirs(pipe: StableDiffusionPipeline) -> Tensor:
    torch.manual_seed(1)
    x = torch.randn(2, 4, 8, 8)
    ids = pipe.tokenizer([PROMPT] * 2, padding="max_length", max_length=32, return_tensors="pt").input_ids
    return pipe.unet(x, torch.tensor([1, 801]), pipe.text_encoder(ids)[0]).sample


@torch.no_grad()
def ours(model: Path, lora: Path | None) -> Tensor:
    torch.manual_seed(1)
    x = torch.randn(2, 4, 8, 8)
    file = ModelFile(model)
    file.fill(loras=[] if lora is None else [(lora, 1.0)])
    text_encoder = file.networks["text_encoder"]
    context = text_encoder(text_encoder.tokenize([PROMPT] * 2))
    return file.networks["unet"].predict(x, torch.tensor([1, 801]), Conditioning(context))


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()
