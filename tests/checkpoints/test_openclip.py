"""The text encoder of SD 2.x: OpenCLIP's names and numbers, both ways."""

import pytest
import torch
from torch import Tensor, nn

from ldm.checkpoints.layout import OPENCLIP_REST, join, split
from ldm.checkpoints.load import load_state_dicts
from ldm.config import instantiate
from ldm.models.text_encoder import CLIPTextEncoder
from tests.checkpoints import sd_v1, sd_v2

LINEAR_UNET = {"unet": {"middle_block.1.proj_in.weight": torch.zeros(2, 2)}}  # the mark of SD 2.x


class Block(nn.Module):
    """A layer as OpenCLIP has it, by torch's own attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        y, M = self.ln_1(x), x.shape[1]
        mask = torch.full((M, M), float("-inf")).triu(1)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        y = nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x)))
        return x + self.mlp["c_proj"](y)


class OpenCLIP(nn.Module):
    """The text encoder with what its files hold besides."""

    def __init__(self, *, vocab_size: int = 50, width: int = 32, heads: int = 4, layers: int = 3):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(8, width))
        self.text_projection = nn.Parameter(torch.randn(width, width))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.token_embedding = nn.Embedding(vocab_size, width)
        blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.ln_final = nn.LayerNorm(width)

    def penultimate(self, ids: Tensor) -> Tensor:
        x = self.token_embedding(ids) + self.positional_embedding
        return self.ln_final(self.transformer["resblocks"][:-1](x))


@pytest.fixture
def reference() -> OpenCLIP:
    torch.manual_seed(0)
    model = OpenCLIP()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # biases start at zero, which hides mistakes
    return model.eval()


@pytest.fixture
def released(reference: OpenCLIP) -> dict[str, Tensor]:
    return {sd_v2.PREFIX + name: tensor for name, tensor in reference.state_dict().items()}


def ours(**params) -> CLIPTextEncoder:
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 3}
    ids = {"bos_token_id": 48, "eos_token_id": 49, "max_length": 8}
    return CLIPTextEncoder(
        **{"num_attention_heads": 4, "hidden_act": "gelu", "layer": "penultimate", **sizes, **ids, **params}
    ).eval()


@torch.no_grad()
def test_the_loaded_tower_computes_what_openclip_does(reference, released):
    encoder, ids = ours(), torch.randint(50, (3, 8))
    load_state_dicts({"text_encoder": encoder}, split(released))
    expected = reference.penultimate(ids)
    assert (encoder(ids) - expected).abs().max() <= 1e-5 * expected.abs().max()
    other = ours(layer="last")
    load_state_dicts({"text_encoder": other}, split(released))
    assert (other(ids) - expected).abs().max() > 1e-2 * expected.abs().max()  # another layer would be seen


def test_split_then_join_is_bit_equal(released):
    parts = split(released | {"cond_stage_model.model.attn_mask": torch.zeros(8, 8)})
    joined = join(LINEAR_UNET | {part: parts[part] for part in ("text_encoder", OPENCLIP_REST)})
    del joined["model.diffusion_model.middle_block.1.proj_in.weight"]
    assert joined.keys() == released.keys()
    assert all(torch.equal(joined[name], released[name]) for name in released)


def test_what_a_trained_tower_lacks_is_filled_in(released):
    """A network holds no projection: the file has one all the same, so that strict loaders accept it."""
    joined = join(LINEAR_UNET | {"text_encoder": split(released)["text_encoder"]})
    assert released.keys() <= joined.keys()
    assert torch.equal(joined[sd_v2.PREFIX + "text_projection"], torch.eye(32))
    assert joined[sd_v2.PREFIX + "logit_scale"].item() == pytest.approx(4.6052, abs=1e-4)


def test_sd1_keeps_the_names_of_transformers(released):
    conv = {"unet": {"middle_block.1.proj_in.weight": torch.zeros(2, 2, 1, 1)}}
    joined = join(conv | {"text_encoder": split(released)["text_encoder"]})
    assert not any(name.startswith(sd_v2.PREFIX) for name in joined)


@torch.no_grad()
def test_a_file_without_the_last_layer_computes_the_same():
    """As diffusers' own converter writes it, from folders that lack the layer that nothing uses."""
    torch.manual_seed(0)
    reference = OpenCLIP(layers=24).eval()
    whole = {sd_v2.PREFIX + name: tensor for name, tensor in reference.state_dict().items()}
    short = {name: tensor for name, tensor in whole.items() if ".resblocks.23." not in name}
    assert len(short) == len(whole) - 12
    encoder, ids = ours(num_hidden_layers=24), torch.randint(50, (3, 8))
    load_state_dicts({"text_encoder": encoder}, split(short))
    expected = reference.penultimate(ids)
    assert (encoder(ids) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_unknown_names_are_kept_to_be_reported(released):
    odd = {sd_v2.PREFIX + "visual.proj": torch.ones(1)}
    assert "visual.proj" in split(released | odd)["text_encoder"]


def test_true_size_networks_have_the_names_and_shapes_of_a_released_file():
    nodes = {
        "unet": {
            "target": "ldm.models.unet.UNetModel",
            "params": {"num_head_channels": 64, "use_linear_in_transformer": True, "context_dim": 1024},
        },
        "vae": {"target": "ldm.models.autoencoder.AutoencoderKL"},
        "text_encoder": {
            "target": "ldm.models.text_encoder.CLIPTextEncoder",
            "params": {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "hidden_act": "gelu",
                "layer": "penultimate",
            },
        },
    }
    with torch.device("meta"):
        parts = {part: instantiate(node).state_dict() for part, node in nodes.items()}
    joined = join(parts, torch.linspace(0.99, 0.01, 1000))
    text = {
        name: tuple(tensor.shape) for name, tensor in joined.items() if name.startswith("cond_stage_model")
    }
    assert len(text) == 294 and text == sd_v2.text_encoder()
    others = {name for name in sd_v1.names() if not name.startswith("cond_stage_model.")}
    assert joined.keys() - text.keys() == others
    assert len(joined) == 686 + 248 + 294 + 12
    assert sum(tensor.numel() for tensor in parts["unet"].values()) == 865_910_724
    assert split(joined)["text_encoder"].keys() == parts["text_encoder"].keys()
