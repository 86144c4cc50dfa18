"""convert.py with a config: the file says what the config decides, and keeps what it does not."""

import copy
import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from torch import nn

from ldm.checkpoints.infer_config import model_config
from ldm.checkpoints.known import flat
from ldm.checkpoints.load import open_model
from ldm.checkpoints.modelspec import file_metadata, with_config_of
from ldm.checkpoints.save import save_model
from ldm.checkpoints.shards import read_shards
from ldm.commands import convert
from ldm.diffusion.schedule import make_alphas_cumprod
from tests.factories import SCHEDULE

FACTS = {
    "modelspec.title": "Rex",
    "modelspec.author": "somebody",
    "modelspec.license": "CC0",
    "modelspec.hash_sha256": "0xab",
    "modelspec.trigger_phrase": "sks dog",
    "ldm.base_sha256": "cd",
    "ldm.training": '{"samples": {"steps": 3}}',
}
OURS = {"parameterization": "v", "zero_terminal_snr": True}
TARGETS = ("out.safetensors", "out.ckpt", "out.safetensors.index.json")


@pytest.fixture
def source(tmp_path: Path, tiny_config: dict, tiny_networks: dict[str, nn.Module]) -> Path:
    """A file of eps and clip skip 1, as a run exports it, with facts."""
    state_dicts = {name: network.state_dict() for name, network in tiny_networks.items()}
    about = file_metadata(model_config(state_dicts, flat(tiny_config)), title="x", size=16)
    alphas_cumprod = make_alphas_cumprod(**SCHEDULE)
    path = tmp_path / "source.safetensors"
    return save_model(path, state_dicts, alphas_cumprod=alphas_cumprod, metadata=about | FACTS)


def written(path: Path, tmp_path: Path, model: dict, target: str, **data: dict) -> Path:
    OmegaConf.save(OmegaConf.create({"model": {"params": model}, **data}), tmp_path / "config.yaml")
    words = [str(path), str(tmp_path / target), "--config", str(tmp_path / "config.yaml")]
    return convert.main(convert.parse(words))


def changed(config: dict, process: dict, clip_skip: int) -> dict:
    config = copy.deepcopy(config)
    config["process"] |= process
    config["text_encoder"]["params"]["clip_skip"] = clip_skip
    return config


@pytest.mark.parametrize("target", [*TARGETS, "folder"])
def test_there_and_back(target, source, tmp_path, tiny_config):
    """v, zero-terminal SNR and clip skip 2, then as it was: the last file is the first, to each key."""
    there = written(source, tmp_path, changed(tiny_config, OURS, 2), target)
    model = open_model(there)
    assert {key: model.config[key] for key in OURS} == OURS and model.prediction == "v"
    if target == "folder":  # it cannot say the clip skip
        return
    assert model.config["text_encoder"]["params"]["clip_skip"] == 2
    assert model.metadata["modelspec.prediction_type"] == "v"
    assert model.metadata["modelspec.encoder_layer"] == "2"
    assert FACTS.items() <= model.metadata.items()
    if target.endswith("safetensors"):
        with safe_open(there, "pt") as file:
            torch.testing.assert_close(file.get_tensor("alphas_cumprod")[-1].item(), 0.0, atol=1e-6, rtol=0)
    back = open_model(written(there, tmp_path, changed(tiny_config, {}, 1), "back.safetensors"))
    first = open_model(source)
    assert back.metadata == first.metadata
    assert back.config == first.config


@pytest.mark.parametrize("target", TARGETS)
def test_a_key_that_the_config_leaves_out_is_taken_off(target, source, tmp_path, tiny_config):
    skipping = written(source, tmp_path, changed(tiny_config, OURS, 2), "skipping.safetensors")
    config = changed(tiny_config, {"parameterization": "x0"}, 1)
    model = open_model(written(skipping, tmp_path, config, target, data={"params": {"size": 32}}))
    assert model.config["parameterization"] == "x0" and model.given_size == 32
    assert not model.metadata.keys() & {"modelspec.prediction_type", "modelspec.encoder_layer"}
    assert model.metadata["modelspec.resolution"] == "32x32"


def test_a_vae_that_is_swapped_in_is_described(source, tmp_path, tiny_config, tiny_networks):
    node = copy.deepcopy(tiny_config["vae"])
    node["params"]["num_groups"] = 16
    vae = save_model(
        tmp_path / "vae.safetensors",
        {"vae": tiny_networks["vae"].state_dict()},
        alphas_cumprod=None,
        metadata={"ldm.config": json.dumps({"vae": node})},
    )
    out = convert.main(convert.parse([str(source), str(tmp_path / "o.safetensors"), "--vae", str(vae)]))
    assert open_model(out).config["vae"]["params"]["num_groups"] == 16


def test_what_another_tool_says_more_exactly_is_kept():
    about = {"modelspec.architecture": "stable-diffusion-xl-v1-base", "modelspec.resolution": "1024x1024"}
    about |= {"ldm.size": "1024"}
    said = {"modelspec.architecture": "stable-diffusion-xl-turbo-v1", "modelspec.resolution": "1024x768"}
    assert with_config_of(said, about) == about | said
    old = {"modelspec.architecture": "stable-diffusion-v1", "modelspec.resolution": "512x512"}
    assert with_config_of(old, about) == about


def test_shards_all_say_it(source, tmp_path, tiny_config):
    index = written(source, tmp_path, changed(tiny_config, OURS, 2), "out.safetensors.index.json")
    single = written(source, tmp_path, changed(tiny_config, OURS, 2), "out.safetensors")
    tensors, metadata = read_shards(index)
    with safe_open(single, "pt") as file:
        assert set(file.keys()) == set(tensors)
        assert file.metadata() == metadata
