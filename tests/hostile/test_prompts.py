"""Prompts from anywhere: each becomes ids that the text encoder takes, or is refused by name."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm.data.captions import CaptionReader
from ldm.data.prompts import check_prompts, fill
from ldm.models.text_encoder import CLIPTextEncoder
from tests.hostile.conftest import examples, outcome, refused_or

WORDS = {"identifier": "sks", "class_word": "dog"}
PROMPTS = {
    "nothing at all": "",
    "spaces and line breaks": " \n\t ",
    "emoji": "a photo of 🐕‍🦺 in the ❄️",
    "10,000 characters": "dog " * 2500,
    "control characters": "a\x00photo\x07of\x1b[31m a dog\x7f",
    "right-to-left and combining marks": "صورة كلب e\u0301\u0327\u0328",
    "a lone surrogate": "a photo of a \ud800 dog",
    "the tokenizer's own marks": "<|startoftext|> a dog <|endoftext|>",
}
TEMPLATES = {
    "a misspelt placeholder": ("a photo of {identifer} dog", None),
    "no identifier": ("a photo of a dog", None),
    "an empty template": (" ", None),
    "the identifier in the class's prompt": ("a photo of sks dog", "a photo of sks dog"),
}


@pytest.fixture
def encoder(tiny_config: dict) -> CLIPTextEncoder:
    torch.manual_seed(0)
    return CLIPTextEncoder(**tiny_config["text_encoder"]["params"]).eval()


def encode(encoder: CLIPTextEncoder, prompt: str) -> str:
    ids = encoder.tokenize([prompt])
    assert ids.shape == (1, encoder.max_length) and 0 <= ids.min() and ids.max() < encoder.vocab_size
    with torch.no_grad():
        assert encoder(ids).isfinite().all()
    return f"{encoder.max_length} ids{', the rest cut off' if encoder.truncated_tail(prompt) else ''}"


@pytest.mark.parametrize("what", PROMPTS)
def test_odd_prompts_are_taken(encoder: CLIPTextEncoder, what: str):
    got = outcome("prompt", what, lambda: encode(encoder, PROMPTS[what]))
    assert got.startswith("refused" if what == "a lone surrogate" else "32 ids")


@pytest.mark.parametrize("what", TEMPLATES)
def test_bad_templates_are_refused(what: str):
    template, prior = TEMPLATES[what]

    def check() -> str:
        check_prompts(**WORDS, subject_prompt=fill(template, **WORDS), prior_prompt=prior)
        return "taken"

    assert outcome("prompt", what, check).startswith("refused")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b" \n", b"{thing}", b"[" * 100_000, b"{}", b"[1]"])
@pytest.mark.parametrize("file", ["photo.txt", "photo.caption", "photo.json", "metadata.jsonl"])
def test_bad_captions_are_refused(tmp_path: Path, content: bytes, file: str):
    (tmp_path / file).write_bytes(content)
    what = f"a {file} of {content[:20]!r}"
    read = CaptionReader(True, tmp_path, WORDS)
    got = outcome("prompt", what, lambda: str(read(tmp_path / "photo.png")), hide=tmp_path)
    none_listed = file == "metadata.jsonl" and not content.strip()
    text = file.endswith(("txt", "caption")) and content in (b"[" * 100_000, b"[1]")
    assert got.startswith("refused") or none_listed or text


@examples(80)
@given(prompt=st.text(max_size=200) | st.text(alphabet="{}|<>\\ a🐕\x00", max_size=40))
def test_any_prompt(encoder: CLIPTextEncoder, prompt: str):
    assert encode(encoder, prompt).startswith("32 ids")
    refused_or(lambda: fill(prompt, **WORDS))
