"""A run's own checkpoints as models: what it trained is in them, or they are refused."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from ldm.checkpoints.embedding import read_embedding
from ldm.checkpoints.load import open_model
from ldm.checkpoints.lora import merge_lora
from ldm.commands import convert
from ldm.errors import UserError
from ldm.model_file import ModelFile
from ldm.runs.run import base_files, load_base
from ldm.schema import RunConfig, TrainerOptions
from ldm.training.latent_diffusion import LatentDiffusion
from tests.factories import build_module

TARGET = "ldm.training.latent_diffusion.LatentDiffusion"
LORA = {"target": "ldm.models.lora.LoRA", "params": {"rank": 4, "alpha": 6.0}}
TOKEN = {
    "target": "ldm.training.techniques.LearnedToken",
    "params": {"word": "<my-v1.5-disc>", "init": "disc"},
}


def files_of(**base: object) -> dict[str, Path]:
    """The base files of a run's config."""
    nodes = {"model": {"target": ""}, "data": {"target": ""}}
    return base_files(RunConfig(name="run", seed=0, trainer=TrainerOptions(max_steps=1), **nodes, **base))


def trained(params: dict, run: Path) -> LatentDiffusion:
    """A module with random weights, its checkpoint in a run's folder, and the run's config."""
    module = build_module(params)
    module.add_learned_token()
    torch.manual_seed(4)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    (run / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": module.state_dict(), "global_step": 3}, run / "checkpoints" / "step-3.ckpt")
    config = {"model": {"target": TARGET, "params": params}, "data": {"params": {"size": 48}}}
    OmegaConf.save(OmegaConf.create(config), run / "config.yaml")
    return module


def expected(module: LatentDiffusion) -> dict[str, dict[str, Tensor]]:
    state_dicts = {name: network.state_dict() for name, network in module.networks.items()}
    text = state_dicts["text_encoder"]
    state_dicts["text_encoder"] = {name: x for name, x in text.items() if "learned_tokens" not in name}
    return merge_lora(state_dicts, module.lora.weights()) if module.lora else state_dicts


def assert_has(networks: dict[str, nn.Module], weights: dict[str, dict[str, Tensor]]) -> None:
    for name, network in networks.items():
        state = {key: x for key, x in network.state_dict().items() if "learned_tokens" not in key}
        assert state.keys() == weights[name].keys()
        assert all(torch.equal(state[key], weights[name][key]) for key in state)


@pytest.fixture(params=["lora", "t-lora", "all", "token"])
def params(request: pytest.FixtureRequest, tiny_config: dict) -> dict:
    """Of a run that trains a LoRA, all weights, or a learned token; heads that no default has."""
    by_timestep = {**LORA, "params": LORA["params"] | {"rank_by_timestep": {"min_rank": 2}}}
    more = {"lora": {"lora": LORA}, "t-lora": {"lora": by_timestep}, "all": {}}
    more["token"] = {"learned_token": TOKEN, "unet": False}
    return tiny_config | {"trainable": more[request.param]}


def test_what_it_trained_is_read(params: dict, tmp_path: Path):
    module = trained(params, tmp_path / "run")
    file = ModelFile(tmp_path / "run" / "checkpoints" / "step-3.ckpt")
    file.fill()
    assert_has(file.networks, expected(module))
    assert file.model.size("eps") == 48
    assert file.networks["unet"].input_blocks[1][1].transformer_blocks[0].attn1.num_heads == 4
    learned = dict(file.networks["text_encoder"].learned_tokens.items())
    assert learned.keys() == dict(module.cond_stage_model.learned_tokens.items()).keys()
    for word, vectors in learned.items():
        assert torch.equal(vectors, module.cond_stage_model.learned_tokens[word])


def test_it_is_converted(params: dict, tmp_path: Path):
    module = trained(params, tmp_path / "run")
    source, target = tmp_path / "run" / "checkpoints" / "step-3.ckpt", tmp_path / "out" / "model.safetensors"
    convert.main(convert.parse([str(source), str(target)]))
    file = ModelFile(target)
    file.fill()
    assert_has(file.networks, expected(module))
    assert file.model.size("eps") == 48
    for word, vectors in module.cond_stage_model.learned_tokens.items():
        assert word == TOKEN["params"]["word"]
        (kept,) = (target.parent / "embeddings").iterdir()
        assert kept.name == "my-v1.5-disc.safetensors"
        torch.testing.assert_close(read_embedding(kept), {word: vectors.data})
        assert torch.equal(file.networks["text_encoder"].learned_tokens[word], vectors)


def test_a_token_of_another_run_is_not_written_over(tiny_config: dict, tmp_path: Path):
    """Of the same word; the same token again is no other."""
    targets = tmp_path / "models"
    for name in ("rex", "tom"):
        trained(tiny_config | {"trainable": {"learned_token": TOKEN, "unet": False}}, tmp_path / name)
    checkpoint = tmp_path / "tom" / "checkpoints" / "step-3.ckpt"
    content = torch.load(checkpoint)
    (key,) = (key for key in content["state_dict"] if "learned_tokens" in key)
    content["state_dict"][key] += 1
    torch.save(content, checkpoint)
    for name in ("a", "again"):
        convert.main(convert.parse([str(tmp_path / "rex/checkpoints/step-3.ckpt"), f"{targets}/{name}.ckpt"]))
    before = (targets / "embeddings" / "my-v1.5-disc.safetensors").read_bytes()
    with pytest.raises(
        UserError, match="Another embedding is in this file .*Remove the file.*another folder"
    ):
        convert.main(convert.parse([str(checkpoint), f"{targets}/b.ckpt"]))
    assert (targets / "embeddings" / "my-v1.5-disc.safetensors").read_bytes() == before
    assert not (targets / "b.ckpt").exists()


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_what_an_adapter_trained_is_read(tiny_config: dict, tmp_path: Path, kind: str):
    pytest.importorskip("lycoris", reason="needs lycoris-lora, whose adapter it is")
    params = tiny_config | {"trainable": {"adapter": {"kind": kind, "rank": 4}}}
    module = trained(params, tmp_path / "run")
    moved = (tmp_path / "run" / "checkpoints" / "step-3.ckpt").rename(tmp_path / "moved.ckpt")
    file = ModelFile(moved, config=OmegaConf.to_container(OmegaConf.load(tmp_path / "run" / "config.yaml")))
    file.fill()
    adapted = module.lora.adapted().items()
    changed = {(name, f"{layer}.weight"): own.merged() for (name, layer), own in adapted}
    assert len(changed) > 10
    for name, network in module.networks.items():
        mine, read = network.state_dict(), file.networks[name].state_dict()
        for key, tensor in read.items():
            torch.testing.assert_close(tensor, changed.get((name, key), mine[key]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["dora", "oft"])
def test_another_adapters_is_for_its_run_alone(tiny_config: dict, tmp_path: Path, kind: str):
    pytest.importorskip("lycoris", reason="needs lycoris-lora, whose adapter it is")
    trained(tiny_config | {"trainable": {"adapter": {"kind": kind}}}, tmp_path / "run")
    with pytest.raises(UserError, match="checkpoint of an adapter.*Use the run's model.safetensors"):
        open_model(tmp_path / "run" / "checkpoints" / "step-3.ckpt")


def test_it_is_a_base(params: dict, tmp_path: Path, tiny_networks: dict[str, nn.Module]):
    module = trained(params, tmp_path / "run")
    source = tmp_path / "run" / "checkpoints" / "step-3.ckpt"
    if module.trainable.learned_token is not None:
        with pytest.raises(UserError, match="learned word <my-v1.5-disc>.*would be lost"):
            load_base(tiny_networks, files_of(base_checkpoint=str(source)))
    else:
        load_base(tiny_networks, files_of(base_checkpoint=str(source)))
        assert_has(tiny_networks, expected(module))


def test_out_of_its_run_it_needs_the_config(tiny_config: dict, tmp_path: Path):
    module = trained(tiny_config | {"trainable": {"lora": LORA}}, tmp_path / "run")
    moved = (tmp_path / "run" / "checkpoints" / "step-3.ckpt").rename(tmp_path / "moved.ckpt")
    with pytest.raises(UserError, match=r"checkpoint of a LoRA.*--config RUN/config\.yaml"):
        open_model(moved)
    config = OmegaConf.to_container(OmegaConf.load(tmp_path / "run" / "config.yaml"))
    file = ModelFile(moved, config=config)
    file.fill()
    assert_has(file.networks, expected(module))
    assert file.model.size("eps") == 48
    words = [str(moved), str(tmp_path / "out.ckpt"), "--config", str(tmp_path / "run" / "config.yaml")]
    file = ModelFile(convert.main(convert.parse(words)))
    file.fill()
    assert_has(file.networks, expected(module))


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop(next(name for name in state if name.endswith("to_q.up"))),
        lambda state: state.update({"lora.layers.vae.decoder.conv_in.down": torch.ones(1, 4, 3, 3)}),
        lambda state: state.update({"lora.layers.down": torch.ones(1)}),
        lambda state: state.update(
            {
                "lora.layers.unet.nowhere.down": torch.ones(1, 2),
                "lora.layers.unet.nowhere.up": torch.ones(2, 1),
            }
        ),
    ],
    ids=["a matrix is missing", "of the VAE", "of no network", "of no layer"],
)
def test_factors_that_fit_nowhere(change, tiny_config: dict, tmp_path: Path):
    trained(tiny_config | {"trainable": {"lora": LORA}}, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-3.ckpt"
    content = torch.load(path)
    change(content["state_dict"])
    torch.save(content, path)
    with pytest.raises(UserError, match="belongs to no layer|has no up matrix"):
        ModelFile(path).fill()


def test_the_run_s_files_are_named_after_it_and_the_word(tiny_config: dict, tmp_path: Path):
    """A1111 and ComfyUI call a LoRA and an embedding by the names of their files."""
    module = trained(tiny_config | {"trainable": {"lora": LORA, "learned_token": TOKEN}}, tmp_path / "rex")
    metadata = {"ldm.config": json.dumps(tiny_config)}
    model = module.export(tmp_path / "rex" / "model.safetensors", dtype=torch.float32, metadata=metadata)
    found = {p.relative_to(model.parent).as_posix() for p in model.parent.rglob("*.safetensors")}
    assert found == {"model.safetensors", "loras/rex.safetensors", "embeddings/my-v1.5-disc.safetensors"}
    file = ModelFile(model)
    file.fill()
    assert list(file.networks["text_encoder"].learned_tokens.words) == [TOKEN["params"]["word"]]
