"""One path from prompts to what the UNet is told: indices, chunks, and a vector of each item."""

import pytest
import torch
from torch import Tensor, nn

from ldm.conditioner import Conditioner, padding_of
from ldm.config import instantiate, load_config
from ldm.models.conditioning import Conditioning, TextEncoding, distinct
from ldm.models.unet import timestep_embedding

PROMPTS = ["a dog", "a red cat", "a dog", ""]


class Pooling(nn.Module):
    """A text encoder that gives a vector of the prompt as a whole too: the mean of its context."""

    def __init__(self, text_encoder: nn.Module):
        super().__init__()
        self.inner = text_encoder
        self.tokenize, self.tokenize_chunks = text_encoder.tokenize, text_encoder.tokenize_chunks
        self.device = text_encoder.device
        self.unconditional = ""
        self.truncated_tail = text_encoder.truncated_tail

    def encode(self, ids: Tensor) -> TextEncoding:
        context = self.inner(ids)
        return TextEncoding(context, context.mean(1))


def test_equal_prompts_have_one_number():
    assert distinct(["b", "a", "b", "c", "a"]) == (["b", "a", "c"], [0, 1, 0, 2, 1])
    assert distinct([]) == ([], [])


@pytest.mark.parametrize("rows", [[0, 0, 1, 1], [1, 1, 0, 1], [0, 1], [1, 0]])
def test_items_get_what_their_prompts_have(rows: list[int]):
    context, vector = torch.randn(2, 3, 4), torch.randn(2, 5)
    layer, keys, values = torch.nn.Identity(), torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4)
    told = Conditioning(context, vector, {layer: (keys, values)}).select(torch.tensor(rows))
    assert torch.equal(told.context, context[rows]) and torch.equal(told.vector, vector[rows])
    assert torch.equal(told.kept[layer][0], keys[rows]) and torch.equal(told.kept[layer][1], values[rows])
    encoding = TextEncoding(context, vector).select(rows)
    assert torch.equal(encoding.context, context[rows]) and torch.equal(encoding.pooled, vector[rows])
    assert TextEncoding(context).select(rows).pooled is None


@torch.no_grad()
def test_training_and_sampling_encode_alike(tiny_networks: dict[str, nn.Module]):
    """To rounding in the batch's size: what a cache kept, what is encoded anew, and one chunk."""
    conditioner = Conditioner(tiny_networks["text_encoder"])
    anew, kept = conditioner(PROMPTS), conditioner(PROMPTS, frozen=True)
    assert torch.equal(anew.context, kept.context) and anew.context.shape == (4, 32, 32)
    assert torch.equal(conditioner(PROMPTS, frozen=True).context, kept.context)
    for chunked in (False, True):
        found = conditioner.encode(PROMPTS, 2, chunked=chunked)
        assert list(found) == ["a dog", "a red cat", ""]
        for one, context in zip(found.values(), anew.context[[0, 1, 3]], strict=True):
            torch.testing.assert_close(one.context[0], context)
    long = conditioner.encode(["a red cat " * 9], 2, chunked=True)["a red cat " * 9]
    assert long.context.shape == (1, 96, 32) and long.pooled is None


@torch.no_grad()
@pytest.mark.parametrize("frozen", [False, True])
def test_a_vector_is_the_prompts_with_the_items_sizes(tiny_networks: dict[str, nn.Module], frozen: bool):
    text_encoder = Pooling(tiny_networks["text_encoder"])
    conditioner, sizes = Conditioner(text_encoder), torch.arange(24).reshape(4, 6)
    for _ in range(2):
        told = conditioner(PROMPTS, sizes, frozen=frozen)
        numbers = timestep_embedding(sizes.flatten(), 256).reshape(4, 6 * 256)
        assert told.vector.shape == (4, 32 + 6 * 256) and torch.equal(told.vector[:, 32:], numbers)
        own = torch.stack([text_encoder.encode(text_encoder.tokenize([p])).pooled[0] for p in PROMPTS])
        torch.testing.assert_close(told.vector[:, :32], own)
    long = conditioner.encode(["a red cat " * 9], 2, chunked=True)["a red cat " * 9]
    torch.testing.assert_close(long.pooled[0], long.context[0, :32].mean(0))
    with pytest.raises(ValueError, match="sizes"):
        conditioner(PROMPTS)


@torch.no_grad()
@pytest.mark.parametrize("frozen", [False, True])
def test_no_prompt_is_zeros_where_the_encoder_says_so(tiny_networks: dict[str, nn.Module], frozen: bool):
    """A dropped caption in training, and None in sampling; there the empty prompt is encoded."""
    text_encoder = Pooling(tiny_networks["text_encoder"])
    text_encoder.unconditional = None
    conditioner, sizes = Conditioner(text_encoder), torch.ones(4, 6)
    for _ in range(2):
        told = conditioner(PROMPTS, sizes, frozen=frozen)
        assert not told.context[-1].any() and not told.vector[-1, :32].any() and told.vector[-1, 32:].any()
        assert told.context[:-1].abs().sum((1, 2)).all()
    found = conditioner.encode([None, "", "a dog"], 2, chunked=False)
    assert not found[None].context.any() and not found[None].pooled.any() and found[""].context.any()


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "storybook"])
def test_the_padding_of_a_family_is_not_said(family: str):
    """That of its released models, as the shipped configs have it, also where one sets it."""
    node = load_config([f"configs/networks/{family}.yaml"]).model.params.text_encoder
    with torch.device("meta"):
        text_encoder = instantiate(node)
    assert padding_of(text_encoder) is None
    usual = [encoder.pad_token_id for encoder in text_encoder.encoders]
    text_encoder.encoders[0].pad_token_id = 3
    assert padding_of(text_encoder) == [3, *usual[1:]] != usual
