"""The real vocabulary, and prompts beyond its 77 tokens, cut as the web UI of AUTOMATIC1111 cuts them."""

import os
from pathlib import Path

import pytest
import torch

from ldm.diffusion.process import DiscreteDiffusion
from ldm.models.text_encoder import CLIPTextEncoder
from ldm.pipeline import Text2Image

REPOSITORY = Path(__file__).resolve().parents[2]
VOCABULARY = Path(os.environ.get("CLIP_VOCABULARY") or REPOSITORY.parent / "shared" / "data" / "clip")
BOS, EOS = 49406, 49407

real = pytest.mark.skipif(
    not (VOCABULARY / "vocab.json").is_file(),
    reason=f"no vocabulary in {VOCABULARY}: set CLIP_VOCABULARY to a folder of openai/clip-vit-large-patch14",
)


@pytest.fixture
def encoder() -> CLIPTextEncoder:
    """The real vocabulary over a tower that is too narrow to take time."""
    return CLIPTextEncoder(
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        tokenizer=str(VOCABULARY),
    )


def framed(tokens: list[int], *, pad: int = EOS) -> list[int]:
    return [BOS, *tokens, EOS, *[pad] * (75 - len(tokens))]


@real
def test_ids_are_those_of_clip(encoder):
    ids = [320, 1125, 539, 48136, 1929]
    assert encoder.tokenize(["a photo of sks dog"])[0].tolist() == framed(ids)
    assert encoder.tokenize(["A  Photo of\nSKS dog"])[0].tolist() == framed(ids)
    encoder.pad_token_id = 0  # SD 2.x
    assert encoder.tokenize(["a photo of sks dog"])[0].tolist() == framed(ids, pad=0)


@real
def test_chunks_end_after_a_near_comma_or_where_they_are_full(encoder):
    dog, comma = 1929, 267
    expected = {
        "dog " * 75: [[dog] * 75],
        "dog " * 76: [[dog] * 75, [dog]],
        "dog " * 160: [[dog] * 75, [dog] * 75, [dog] * 10],
        "dog " * 60 + ", " + "dog " * 20: [[dog] * 60 + [comma], [dog] * 20],
        "dog " * 55 + ", " + "dog " * 20: [[dog] * 55 + [comma], [dog] * 20],
        "dog " * 54 + ", " + "dog " * 21: [[dog] * 54 + [comma] + [dog] * 20, [dog]],  # too far away
        "dog " * 75 + ", dog": [[dog] * 75, [comma, dog]],
        "dog " * 60 + ", " + "dog " * 14 + ", dog": [
            [dog] * 60 + [comma] + [dog] * 14,  # full, and a comma follows
            [comma, dog],
        ],
    }
    for prompt, chunks in expected.items():
        assert encoder.tokenize_chunks(prompt).tolist() == [framed(chunk) for chunk in chunks], prompt


def test_a_short_prompt_is_one_chunk_and_each_chunk_is_encoded_alone(tiny_networks):
    text_encoder = tiny_networks["text_encoder"]  # a token a character, 30 fit
    for prompt in ("", "a dog", "x" * 30):
        assert torch.equal(text_encoder.tokenize_chunks(prompt), text_encoder.tokenize([prompt]))
    process = DiscreteDiffusion(torch.linspace(0.99, 0.01, 1000))
    t2i = Text2Image(**tiny_networks, process=process, default_size=16)
    long = "the big red dog here, " + "b" * 25
    (encoding, negative), (short, _) = t2i._encodings([long, "a dog"], ["mud"], 4, chunked=True)
    parts = [
        text_encoder(text_encoder.tokenize([part])) for part in ("the big red dog here,", "b" * 25, "mud", "")
    ]
    with torch.no_grad():
        torch.testing.assert_close(encoding.context, torch.cat(parts[:2], dim=1))
        torch.testing.assert_close(negative.context, torch.cat(parts[2:], dim=1))
    assert short.context.shape[1] == 32 and encoding.context.shape[1] == 64


@pytest.mark.parametrize(
    "before, vectors, chunks",
    [
        (27, 8, [27, 8]),  # 30 fit: it begins the next chunk
        (22, 8, [30]),
        (22, 9, [22, 9]),
        (30, 4, [30, 4]),
        (0, 40, [30, 10]),  # longer than any chunk
        (3, 40, [3, 30, 10]),
    ],
)
def test_a_learned_word_is_not_divided(tiny_networks, before, vectors, chunks):
    encoder = tiny_networks["text_encoder"]
    encoder.add_token("<dog>", torch.randn(vectors, 32))
    plain = "b" * before
    rows = encoder.tokenize_chunks(f"{plain}<dog>")
    kept = [
        [n for n in row.tolist()[1:] if n not in (encoder.eos_token_id, encoder.pad_token_id)] for row in rows
    ]
    assert [len(row) for row in kept] == chunks
    learned = list(range(encoder.vocab_size, encoder.vocab_size + vectors))
    assert sum(kept, []) == encoder._tokenize(plain).ids + learned


def test_a_picture_is_the_same_beside_a_longer_prompt(tiny_networks, caplog):
    process = DiscreteDiffusion(torch.linspace(0.99, 0.01, 1000))
    t2i = Text2Image(**tiny_networks, process=process, default_size=16)
    long = "the big red dog here, " + "b" * 25
    options = {"steps": 2, "long_prompts": True}
    together = t2i(["a dog", long, "a cat"], seeds=[0, 1, 2], **options)
    for sample in together:
        alone = t2i([sample.prompt], seeds=[sample.seed], **options)[0]
        torch.testing.assert_close(alone.latents, sample.latents, rtol=1e-4, atol=1e-4)
    plain = t2i(["a dog"], seeds=[0], steps=2)[0]
    torch.testing.assert_close(plain.latents, together[0].latents, rtol=1e-4, atol=1e-4)
    assert not caplog.records
    cut = t2i([long], seeds=[1], steps=2)[0]
    assert "is cut off" in caplog.text and (cut.latents - together[1].latents).abs().max() > 1e-3
