"""Stable Diffusion XL at its true size, on the meta device: counts, names and shapes of the released file."""

import pytest
import torch
from torch import Tensor, nn

from ldm.checkpoints.infer_config import model_config
from ldm.checkpoints.layout import describe, join, split
from ldm.config import instantiate
from ldm.families.known import family_of
from ldm.families.sdxl.family import SDXL
from ldm.families.sdxl.text_encoder import SDXLTextEncoders
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.unet import UNetModel
from tests.families import sdxl_base

UNET = {
    "channel_mult": [1, 2, 4],
    "attention_resolutions": [2, 4],
    "transformer_depth": [1, 2, 10],
    "num_head_channels": 64,
    "context_dim": 2048,
    "adm_in_channels": 2816,
    "use_linear_in_transformer": True,
}


def true_size_networks() -> dict[str, nn.Module]:
    with torch.device("meta"):
        return {"unet": UNetModel(**UNET), "vae": AutoencoderKL(), "text_encoder": SDXLTextEncoders()}


@pytest.fixture(scope="module")
def state_dicts() -> dict[str, dict[str, Tensor]]:
    return {name: network.state_dict() for name, network in true_size_networks().items()}


def test_parameters_are_the_releases(state_dicts):
    counts = {name: sum(t.numel() for t in tensors.values()) for name, tensors in state_dicts.items()}
    text = {"clip_l": 123_060_480, "clip_g": 694_659_840}
    assert counts == {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": sum(text.values())}
    for number, count in enumerate(text.values()):
        own = [
            t for name, t in state_dicts["text_encoder"].items() if name.startswith(f"embedders.{number}.")
        ]
        assert sum(t.numel() for t in own) == count


def test_a_written_file_has_the_names_and_shapes_of_the_released_one(state_dicts):
    file = join(state_dicts, torch.rand(1000))
    assert len(sdxl_base.names()) == 2515
    assert file.keys() == sdxl_base.names()
    text = sdxl_base.text_encoders()
    assert {name: tuple(file[name].shape) for name in text} == text
    assert {name: tuple(tensor.shape) for name, tensor in state_dicts["unet"].items()} == dict(
        sdxl_base.unet()
    )


def test_the_config_of_a_released_file_is_inferred(state_dicts):
    """From names and shapes alone: the networks that are built of it are those that were written."""
    file = join(state_dicts)
    assert describe(file) is None
    read = split(file)
    assert family_of(read) is SDXL
    config = model_config(read)
    assert config["parameterization"] == "eps"
    assert config["vae"]["params"]["scale_factor"] == 0.13025
    assert config["unet"]["params"]["transformer_depth"] == [1, 2, 10]
    inner = config["text_encoder"]["params"]
    assert [inner[key]["params"]["hidden_act"] for key in ("clip_l", "clip_g")] == ["quick_gelu", "gelu"]
    assert [inner[key]["params"]["pad_token_id"] for key in ("clip_l", "clip_g")] == [None, 0]
    with torch.device("meta"):
        built = {name: instantiate(config[name]).state_dict() for name in state_dicts}
    for name, tensors in built.items():
        assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in state_dicts[name].items()}


def test_default_encoders_are_what_a_file_infers(state_dicts):
    """The class's defaults and the family's facts do not drift apart."""
    with torch.device("meta"):
        default, inferred = (
            SDXLTextEncoders(),
            instantiate(model_config(split(join(state_dicts)))["text_encoder"]),
        )
    for a, b in zip(default.embedders, inferred.embedders, strict=True):
        for name in (
            "layer",
            "depth",
            "max_length",
            "pad_token_id",
            "eos_token_id",
            "vocab_size",
            "tokenizer_name",
        ):
            assert getattr(a, name) == getattr(b, name), name
        assert a.transformer["text_model"].config.to_dict() == b.transformer["text_model"].config.to_dict()
