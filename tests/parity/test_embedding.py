"""Textual-inversion files against diffusers: `load_textual_inversion` makes the same context of ours."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoints.embedding import read_embedding, save_embedding
from ldm.checkpoints.load import open_model
from ldm.checkpoints.save_folder import save_folder
from ldm.errors import UserError
from ldm.pipeline import Text2Image

PROMPT = "a photo of <my-disc> disc"


@pytest.fixture
def vectors() -> Tensor:
    return torch.randn(3, 32, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("count", [1, 3])
def test_diffusers_reads_the_same_word(count, vectors, tiny_model_file, tiny_tokenizer, tmp_path):
    model = open_model(tiny_model_file)
    folder = save_folder(
        tmp_path / "folder", model.state_dicts, config=model.config, tokenizer=tiny_tokenizer, size=16
    )
    file = save_embedding(tmp_path / "disc.safetensors", "<my-disc>", vectors[:count], metadata={})
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.load_textual_inversion(file.parent, weight_name=file.name)
    prompt = pipe.maybe_convert_prompt(PROMPT, pipe.tokenizer)
    ids = pipe.tokenizer(prompt, padding="max_length", max_length=32, return_tensors="pt").input_ids
    text_encoder = Text2Image.from_file(tiny_model_file, embeddings=[file]).text_encoder
    with torch.no_grad():
        theirs, ours = pipe.text_encoder(ids)[0], text_encoder(text_encoder.tokenize([PROMPT]))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    plain = Text2Image.from_file(tiny_model_file).text_encoder
    assert not torch.allclose(ours, plain(plain.tokenize([PROMPT])), atol=1e-2)


def test_files_of_other_tools(vectors, tmp_path):
    save_file({"emb_params": vectors}, tmp_path / "my-cat.safetensors")  # kohya
    torch.save({"string_to_param": {"*": vectors}, "name": "x"}, tmp_path / "my-dog.pt")  # A1111
    torch.save({"<owl>": vectors[0]}, tmp_path / "learned_embeds.bin")  # diffusers
    for file, word in (
        ("my-cat.safetensors", "my-cat"),
        ("my-dog.pt", "my-dog"),
        ("learned_embeds.bin", "<owl>"),
    ):
        found = read_embedding(tmp_path / file)
        expected = vectors[:1] if word == "<owl>" else vectors
        torch.testing.assert_close(found, {word: expected})


def test_a_model_is_no_embedding(tiny_model_file):
    with pytest.raises(UserError, match="not a textual-inversion"):
        read_embedding(tiny_model_file)
