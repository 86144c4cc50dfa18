"""Our way through CLIP's layers against transformers' own, with its plain (eager) attention."""

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.models.text_encoder import CLIPTextEncoder

TOLERANCE = 1e-5  # of the largest output, float32
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "bos_token_id": 97,
    "eos_token_id": 98,
}


def pair(hidden_act: str, layer: str) -> tuple[CLIPTextEncoder, CLIPTextModel]:
    """The same weights twice, larger than at initialisation so that every token matters."""
    torch.manual_seed(0)
    ours = CLIPTextEncoder(**SIZES, max_length=16, hidden_act=hidden_act, layer=layer).eval()
    for parameter in ours.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    config = CLIPTextConfig(
        **SIZES, max_position_embeddings=16, hidden_act=hidden_act, attn_implementation="eager"
    )
    reference = CLIPTextModel(config).eval()
    reference.load_state_dict(ours.transformer["text_model"].state_dict(), strict=True)
    return ours, reference


def relative_error(ours: Tensor, reference: Tensor) -> float:
    return ((ours - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("length", [16, 5])
@torch.no_grad()
def test_last_layer_equals_transformers(hidden_act, length):
    ours, reference = pair(hidden_act, "last")
    ids = torch.randint(97, (3, length))
    assert relative_error(ours(ids), reference(input_ids=ids).last_hidden_state) <= TOLERANCE


@torch.no_grad()
def test_penultimate_layer_equals_transformers():
    ours, reference = pair("gelu", "penultimate")
    ids = torch.randint(97, (3, 16))
    states = reference(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(states) == 1 + SIZES["num_hidden_layers"]
    assert relative_error(ours(ids), reference.final_layer_norm(states[-2])) <= TOLERANCE


@torch.no_grad()
def test_the_tolerance_tells_neighbours_apart():
    """Another layer, activation or single token: each moves the output beyond the tolerance."""
    ours, _ = pair("quick_gelu", "last")
    ids = torch.randint(97, (3, 16))
    output = ours(ids)
    other = ids.clone()
    other[:, 3] = (other[:, 3] + 1) % 97
    assert relative_error(ours(other), output) > 10 * TOLERANCE
    assert relative_error(pair("gelu", "last")[0](ids), output) > 10 * TOLERANCE
    assert relative_error(pair("quick_gelu", "penultimate")[0](ids), output) > 10 * TOLERANCE
