"""Adapters made by the LyCORIS library itself: the same prediction, or refused by the kind that they are."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from ldm.checkpoints.load import open_model
from ldm.checkpoints.lora import read_lora
from ldm.errors import UserError
from tests.parity.conftest import TOLERANCE, ours, relative, theirs

kohya = pytest.importorskip("lycoris.kohya", reason="needs lycoris-lora, which makes the files")
wrapper = pytest.importorskip("lycoris.wrapper", reason="needs lycoris-lora, which makes the files")

EVERY_LAYER = """enable_conv = true
unet_target_module = ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"]
unet_target_name = ["conv_in", "conv_out", "time_embedding.linear_1"]
text_encoder_target_module = ["CLIPAttention", "CLIPMLP"]
"""
LINEAR_LAYERS = """enable_conv = false
unet_target_module = ["BasicTransformerBlock", "TimestepEmbedding"]
unet_target_name = []
text_encoder_target_module = ["CLIPAttention", "CLIPMLP"]
"""
THREE_LAYERS = """enable_conv = true
unet_target_module = []
unet_target_name = ["mid_block.attentions.0.proj_in", "mid_block.resnets.0.conv1", "mid_block.resnets.0.norm"]
text_encoder_target_module = []
"""
READ = {  # plain LoRAs: name -> arguments of the library, layers
    "convolutions of another rank": ({"algo": "lora", "conv_dim": 2, "conv_alpha": 3}, EVERY_LAYER),
    "rank-stabilized, with a scalar": ({"algo": "locon", "rs_lora": True, "use_scalar": True}, EVERY_LAYER),
    "DyLoRA": (
        {"algo": "dylora", "block_size": 2},
        LINEAR_LAYERS,
    ),  # no convolutions: it cannot read its own
}
REFUSED = [  # arguments of the library -> what such a file is called
    ({"algo": "lora", "dora_wd": True}, "a DoRA"),
    ({"algo": "loha", "dora_wd": True}, "a DoRA"),
    ({"algo": "lokr", "dora_wd": True}, "a DoRA"),
    ({"algo": "locon", "use_tucker": True}, "a LoCon with Tucker decomposition"),
    ({"algo": "full"}, "a LyCORIS of whole differences"),
    ({"algo": "lora", "train_norm": True}, "a LyCORIS of whole differences"),
    ({"algo": "diag-oft"}, "an OFT"),
    ({"algo": "boft"}, "an OFT"),  # under the same names
    ({"algo": "glora"}, "a GLoRA"),
    ({"algo": "ia3"}, r"an \(IA\)\^3"),
    ({"algo": "tlora"}, "a T-LoRA"),
]


def filled(network: nn.Module) -> nn.Module:
    """Random weights: as made, an adapter changes nothing."""
    torch.manual_seed(4)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network


def by_lycoris(pipe: StableDiffusionPipeline, file: Path, layers: str, **how: object) -> Path:
    preset = file.with_suffix(".toml")
    preset.write_text(layers)
    how |= {"preset": str(preset), "warn_on_unmatched": False}
    network = kohya.create_network(1.0, 4, 2, pipe.vae, pipe.text_encoder, pipe.unet, **how)
    for each in network.loras:  # as its trainer does, without the change to the networks
        network.add_module(each.lora_name, each)
    filled(network).save_weights(str(file), torch.float32, {})
    return file


def read_by_lycoris(pipe: StableDiffusionPipeline, file: Path) -> Tensor:
    """The prediction with what the library reads from a file."""
    network, _ = kohya.create_network_from_weights(1.0, str(file), pipe.vae, pipe.text_encoder, pipe.unet)
    network.apply_to(pipe.text_encoder, pipe.unet, True, True)
    return theirs(pipe)


@pytest.mark.parametrize("kind", READ)
def test_plain_loras_are_read(kind, pipe, tiny_model_file, tmp_path):
    how, layers = READ[kind]
    file, plain = by_lycoris(pipe, tmp_path / "x.safetensors", layers, **how), theirs(pipe)
    got, expected = ours(tiny_model_file, file), read_by_lycoris(pipe, file)
    assert relative(got, expected) < TOLERANCE and relative(plain, expected) > 1000 * TOLERANCE


def test_the_wrapper_of_any_module_names_no_network(pipe, tiny_model_file, tmp_path):
    network = wrapper.create_lycoris(pipe.unet, 1.0, linear_dim=4, linear_alpha=2, warn_on_unmatched=False)
    network.apply_to()
    filled(network).save_weights(str(tmp_path / "x.safetensors"), torch.float32, {})
    assert relative(ours(tiny_model_file, tmp_path / "x.safetensors"), theirs(pipe)) < TOLERANCE
    assert relative(ours(tiny_model_file, None), theirs(pipe)) > 1000 * TOLERANCE


def test_others_are_refused_by_their_kind(pipe, tiny_model_file, tmp_path):
    state_dicts = open_model(tiny_model_file).state_dicts
    for how, name in REFUSED:
        file = by_lycoris(pipe, tmp_path / "x.safetensors", THREE_LAYERS, **how)
        with pytest.raises(UserError, match=f"This is {name}, not a plain LoRA, LoHa or LoKr.*x.safetensors"):
            read_lora(file, state_dicts)
