"""SDXL's two text encoders as one network: what is refused, what learns, and the vector of an item."""

import pytest
import torch

from ldm.errors import UserError
from ldm.families.sdxl.conditioning import Sizes, size_vector, vector_width
from ldm.families.sdxl.text_encoder import SDXLTextEncoders
from ldm.models.unet import UNetModel, timestep_embedding
from ldm.optim.optimizers import build_optimizer
from ldm.training.text_rates import each_encoder, freeze_unrated, rates_of_encoders
from ldm.training.trainable import Trainable
from tests.factories import build_module

SMALL = {
    "vocab_size": 99,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "bos_token_id": 97,
    "eos_token_id": 98,
    "max_length": 8,
    "layer": "penultimate_hidden",
}
TARGET = "ldm.models.text_encoder.CLIPTextEncoder"


def node(**params) -> dict:
    return {"target": TARGET, "params": SMALL | params}


FIRST = {"hidden_size": 8, "num_hidden_layers": 2}
SECOND = {"hidden_size": 12, "num_hidden_layers": 3, "projection_dim": 5}


def pair(first: dict = FIRST, second: dict = SECOND) -> SDXLTextEncoders:
    torch.manual_seed(0)
    return SDXLTextEncoders(clip_l=node(**first), clip_g=node(**second))


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (SECOND, FIRST, "perhaps they are swapped"),
        (FIRST, SECOND | {"max_length": 9}, "max_length 8 and 9"),
        (FIRST, SECOND | {"vocab_size": 100}, "vocab_size 99 and 100"),
    ],
)
def test_encoders_that_are_no_pair_are_refused(first, second, said):
    with pytest.raises(UserError, match=said):
        pair(first, second)


def test_the_pooled_vector_is_taken_at_the_first_eos():
    """A learned token has an id above eos, and bigG's padding may be eos again: neither is pooled at."""
    encoders = pair()
    ids = torch.tensor([[97, 3, 98, 98, 98, 98, 98, 98], [97, 99, 5, 98, 0, 0, 0, 0]])
    encoders.clip_g.learned_tokens.add("<x>", torch.randn(1, 12))
    clip_g, rows = encoders.clip_g, torch.arange(2)
    text = clip_g.transformer["text_model"]
    _, pooled = clip_g(ids)
    hidden = clip_g._through(clip_g.layers, text.embeddings(inputs_embeds=clip_g._embed(ids)))
    expected = text.final_layer_norm(hidden)[rows, torch.tensor([2, 3])] @ clip_g.text_projection
    torch.testing.assert_close(pooled, expected)


def test_what_reaches_the_unet_learns_and_nothing_else():
    """Each weight that is to learn gets a gradient: context and pooled vector depend on it."""
    encoders = pair().requires_grad_(True)
    ids = torch.randint(97, (2, 2, 8))
    ids[..., -1] = 98
    context, pooled = encoders(ids)
    (context.square().sum() + pooled.square().sum()).backward()
    learning = {name for name, p in encoders.named_parameters() if p.requires_grad}
    assert learning == {name for name, p in encoders.named_parameters() if p.grad is not None}
    assert any("embedders.0." in n for n in learning) and any("text_projection" in n for n in learning)


def test_each_encoder_has_its_rate_or_stays():
    encoders = pair().requires_grad_(True)
    rates = rates_of_encoders(encoders, {"clip_l": 0.0, "clip_g": 2e-6})
    freeze_unrated(encoders, rates)
    parts = each_encoder(encoders.weights)
    learning = {k: any(p.requires_grad for p in module.parameters()) for k, module in parts.items()}
    assert learning == {"clip_l": False, "clip_g": True}
    assert any(p is encoders.clip_g.text_projection for p in parts["clip_g"].parameters())
    trainable = Trainable(learning_rate=1e-6, text_encoder_learning_rate={"clip_l": 0.0, "clip_g": 2e-6})
    networks = {"unet": torch.nn.Linear(1, 1), "text_encoder": encoders, "vae": torch.nn.Linear(1, 1)}
    trainable.attach(networks, timesteps=1000)
    groups = trainable.param_groups(networks)
    assert {name: rate for name, (_, rate) in groups.items()} == {"unet": 1e-6, "clip_l": 0.0, "clip_g": 2e-6}
    with pytest.raises(UserError, match="clip_l and one of clip_g"):
        rates_of_encoders(encoders, {"clip_l": 0.0})
    with pytest.raises(UserError, match="Give one number"):
        rates_of_encoders(encoders.clip_l, {"clip_l": 0.0, "clip_g": 0.0})


@pytest.mark.parametrize("rate", [0.0, 1e-6])
def test_a_rate_of_zero_freezes_the_text_encoder(tiny_config: dict, rate: float):
    """As `text_encoder=false`: no gradients that move nothing, and count in the norm."""
    module = build_module(tiny_config, trainable={"text_encoder_learning_rate": rate})
    frozen = build_module(tiny_config, trainable={"text_encoder": False})
    learning = {name for name, p in module.named_parameters() if p.requires_grad}
    assert (learning == {name for name, p in frozen.named_parameters() if p.requires_grad}) == (rate == 0)
    assert module.trainable.text_learns(module.networks) == (rate > 0)
    assert build_optimizer(module.trainable.param_groups(module.networks), module.optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_size_numbers_are_exact_whatever_the_texts_precision(dtype):
    """bfloat16 has no 1003: its sinusoids would be those of 1004."""
    pooled = torch.randn(1, 5).to(dtype)
    sizes = Sizes((1003, 3003), (5, 9), (1024, 768))
    vector = size_vector(pooled, torch.tensor([sizes.numbers()]))
    assert vector.shape == (1, vector_width(5)) and torch.equal(vector[:, :5], pooled.float())
    for k, number in enumerate((1003, 3003, 5, 9, 1024, 768)):
        own = vector[0, 5 + 256 * k : 5 + 256 * (k + 1)]
        assert torch.equal(own, timestep_embedding(torch.tensor([number]), 256)[0])


def test_only_a_unet_with_a_vector_is_told_sizes():
    with torch.device("meta"):
        unet = UNetModel(model_channels=32, channel_mult=[1], num_heads=2, attention_resolutions=[1])
    assert Sizes.for_unet(None, 8, 8, unet=unet) is None
    with pytest.raises(UserError, match="Only Stable Diffusion XL"):
        Sizes.for_unet(Sizes.of_sample(8, 8), 8, 8, unet=unet)
    unet.adm_in_channels = 5
    assert Sizes.for_unet(None, 8, 16, unet=unet) == Sizes((8, 16), (0, 0), (8, 16))
