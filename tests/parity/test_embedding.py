"""Textual-inversion files against diffusers: `load_textual_inversion` makes the same context of ours."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

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
    file = save_embedding(tmp_path / "words", "<my-disc>", vectors[:count], metadata={})
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    token = {} if count == 1 else {"token": "<my-disc>"}  # of several vectors the key is InvokeAI's
    pipe.load_textual_inversion(file.parent, weight_name=file.name, **token)
    prompt = pipe.maybe_convert_prompt(PROMPT, pipe.tokenizer)
    ids = pipe.tokenizer(prompt, padding="max_length", max_length=32, return_tensors="pt").input_ids
    text_encoder = Text2Image.from_file(tiny_model_file, embeddings=[file]).text_encoder
    with torch.no_grad():
        theirs, ours = pipe.text_encoder(ids)[0], text_encoder(text_encoder.tokenize([PROMPT]))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    plain = Text2Image.from_file(tiny_model_file).text_encoder
    assert not torch.allclose(ours, plain(plain.tokenize([PROMPT])), atol=1e-2)


def test_ours_is_named_as_other_tools_want_it(vectors, tmp_path):
    """The file after the word (A1111, ComfyUI); one vector under the word, several by a key (InvokeAI)."""
    one = save_embedding(tmp_path, "<my-disc>", vectors[:1], metadata={"ldm.config": "{}", "a": "b"})
    assert one == tmp_path / "my-disc.safetensors" and list(load_file(one)) == ["<my-disc>"]
    several = save_embedding(tmp_path / "new", "<my-disc>", vectors, metadata={"ldm.config": "{}", "a": "b"})
    assert list(load_file(several)) == ["emb_params"]
    with safe_open(several, "pt") as file:
        assert file.metadata() == {"a": "b", "ldm.word": "<my-disc>"}
    renamed = several.rename(tmp_path / "rex.safetensors")
    torch.testing.assert_close(read_embedding(renamed), {"<my-disc>": vectors})
    for word, name in (("a/b:c", "abc"), ("..", "embedding"), ("<>", "embedding"), ("v1.5", "v1.5")):
        assert save_embedding(tmp_path, word, vectors, metadata={}).stem == name


OTHER_TOOLS = {  # tool -> what it writes of vectors [3, 32], the file's name, the word
    "kohya": (lambda x: {"emb_params": x}, "my-cat.safetensors", "my-cat"),
    "OneTrainer": (lambda x: {"emp_params": x}, "my-cat.safetensors", "my-cat"),
    "for the first text encoder of SDXL": (lambda x: {"clip_l": x}, "my-cat.safetensors", "my-cat"),
    "A1111": (lambda x: {"string_to_param": {"*": x}, "name": "x", "step": 9}, "my-dog.pt", "my-dog"),
    "A1111, another placeholder": (lambda x: {"string_to_param": {"265": x}}, "my-dog.pt", "my-dog"),
    "A1111, a parameter": (lambda x: {"string_to_param": {"*": nn.Parameter(x)}}, "v1.5.pt", "v1.5"),
    "diffusers": (lambda x: {"<owl>": x}, "learned_embeds.bin", "<owl>"),
    "diffusers, safetensors": (lambda x: {"<owl>": x}, "learned_embeds.safetensors", "<owl>"),
    "a bare tensor": (lambda x: x, "my-dog.pt", "my-dog"),
    "a list of vectors": (list, "my-dog.pt", "my-dog"),
    "a list of tensors": (lambda x: list(x.split(2)), "my-dog.bin", "my-dog"),
}


@pytest.mark.parametrize("tool", OTHER_TOOLS)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_files_of_other_tools(tool, count, dtype, vectors, tiny_model_file, tmp_path):
    content, name, word = OTHER_TOOLS[tool]
    expected = vectors[:count].to(dtype)
    save = save_file if name.endswith(".safetensors") else torch.save
    save(content(expected), tmp_path / name)
    torch.testing.assert_close(read_embedding(tmp_path / name), {word: expected}, check_stride=False)
    text_encoder = Text2Image.from_file(tiny_model_file, embeddings=[tmp_path / name]).text_encoder
    with torch.no_grad():
        new, old = (text_encoder(text_encoder.tokenize([f"a {w}"])) for w in (word.upper(), "disc"))
    assert not torch.allclose(new, old, atol=1e-2)
    assert (text_encoder.tokenize([f"a {word}"]) >= text_encoder.vocab_size).sum() == count


def test_a_single_vector_without_its_axis(vectors, tmp_path):
    torch.save({"<owl>": vectors[0]}, tmp_path / "learned_embeds.bin")
    torch.testing.assert_close(read_embedding(tmp_path / "learned_embeds.bin"), {"<owl>": vectors[:1]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"clip_g": torch.ones(2, 9)}, "embedding of Stable Diffusion XL"),
        ({"emb_params": torch.ones(2, 8), "*": torch.ones(2, 8)}, "the same word"),
        ({}, "not a textual-inversion"),
        ({"string_to_param": {}}, "not a textual-inversion"),
        ({"string_to_param": {"*": 3}}, "not a textual-inversion"),
        ({"string_to_param": 3}, "not a textual-inversion"),
        ({3: torch.ones(2, 8)}, "not a textual-inversion"),
        ({"<owl>": torch.ones(2, 8, dtype=torch.int64)}, "not a textual-inversion"),
        ({"<owl>": torch.ones(2, 8, 8)}, "not a textual-inversion"),
        ({"<owl>": torch.ones(0, 8)}, "not a textual-inversion"),
        ({"<owl>": torch.ones(2, 8).to_sparse()}, "not a textual-inversion"),
        ({f"<{k}>": torch.ones(1, 8) for k in range(9)}, "not a textual-inversion"),
        ([torch.ones(8), torch.ones(9)], "not a textual-inversion"),
        ([], "not a textual-inversion"),
        (7, "not a textual-inversion"),
    ],
)
def test_what_is_no_embedding(content, message, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=message):
        read_embedding(tmp_path / "x.pt")


def test_an_embedding_of_sdxl_is_not_for_sd(tiny_model_file, tmp_path):
    both = {"clip_l": torch.ones(2, 32), "clip_g": torch.ones(2, 9)}
    save_file(both, tmp_path / "owl.safetensors")
    torch.testing.assert_close(read_embedding(tmp_path / "owl.safetensors"), {"owl": both})
    with pytest.raises(UserError, match="one of Stable Diffusion XL"):
        Text2Image.from_file(tiny_model_file, embeddings=[tmp_path / "owl.safetensors"])


def test_a_model_is_no_embedding(tiny_model_file):
    with pytest.raises(UserError, match="not a textual-inversion"):
        read_embedding(tiny_model_file)
