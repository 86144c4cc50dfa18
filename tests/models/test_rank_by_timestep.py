"""T-LoRA: each item has the ranks of its timestep, in training, in sampling and from its file."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.checkpoints.load import open_model
from ldm.checkpoints.lora import merge_lora, read_lora
from ldm.checkpoints.lora_ranks import KEY, ranks_metadata, read_ranks
from ldm.commands import convert
from ldm.errors import UserError
from ldm.models.lora import LoRA
from ldm.models.lora_layer import OrthogonalLoRALayer
from ldm.models.rank_by_timestep import RankByTimestep, RankMasks
from ldm.pipeline import Text2Image
from ldm.runs.sampling import text2image
from ldm.training.compiling import TrainingGraph
from ldm.training.latent_diffusion import LatentDiffusion
from tests.factories import TAUGHT, build_module
from tests.short_runs import At, Job, Killed, differences, kill, state_of

EVERY = ["attention", "feed_forward", "projections", "convolutions"]
BY_TIMESTEP = {"min_rank": 1}


def node(**params: object) -> dict:
    own = {"rank": 4, "alpha": 2.0, "unet": EVERY, "rank_by_timestep": BY_TIMESTEP, **params}
    return {"lora": {"target": "ldm.models.lora.LoRA", "params": own}}


def build(config: dict, networks: dict[str, nn.Module], **params: object) -> LatentDiffusion:
    module = build_module(config, seed=7, trainable=node(**params))
    for name, network in module.networks.items():
        network.load_state_dict(networks[name].state_dict())
    return randomized(module)


def randomized(module: LatentDiffusion) -> LatentDiffusion:
    torch.manual_seed(3)
    for parameter in module.lora.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


def merged(module: LatentDiffusion, networks: dict[str, nn.Module], ranks: int) -> dict:
    """Weights with the first ranks of each of the UNet's updates, and all of the text encoder's."""
    layers = module.lora.weights()
    for name, (down, up, alpha) in layers["unet"].items():
        kept = (torch.arange(len(down)) % 4 < ranks).float().view(-1, *[1] * (down.ndim - 1))
        layers["unet"][name] = down * kept, up, alpha
    return merge_lora({name: network.state_dict() for name, network in networks.items()}, layers)


@pytest.mark.parametrize(("rank", "lowest"), [(4, 1), (16, 8), (5, 5), (128, 1)])
def test_the_ranks_of_a_timestep_are_the_papers(rank: int, lowest: int):
    masks = RankMasks([], rank=rank, min_rank=lowest, timesteps=1000).mask(torch.arange(1000))
    expected = [(rank - lowest) * (1000 - t) // 1000 + lowest for t in range(1000)]
    assert masks.sum(1).tolist() == expected and expected[0] == rank
    assert torch.equal(masks, masks.sort(dim=1, descending=True).values)  # the first ones


def test_half_of_the_ranks_stay_by_default():
    assert [RankByTimestep().lowest(rank) for rank in (1, 2, 5, 64)] == [1, 1, 2, 32]
    with pytest.raises(UserError, match="9 ranks are more than the LoRA's 8.*min_rank"):
        RankByTimestep(min_rank=9).lowest(8)


@pytest.mark.parametrize("layer", [nn.Linear(12, 20), nn.Conv2d(3, 20, 3), nn.Conv2d(12, 8, 1)])
def test_the_factors_begin_orthonormal_and_change_nothing(layer: nn.Module):
    torch.manual_seed(0)
    beside = OrthogonalLoRALayer(layer, rank=6, alpha=6.0)
    down, up = beside.down.flatten(1), beside.up.flatten(1)
    torch.testing.assert_close(down @ down.T, torch.eye(6))
    torch.testing.assert_close(up.T @ up, torch.eye(6))
    assert (beside.scale.diff() <= 0).all() and beside.scale.min() > 0
    x = torch.randn(2, 12) if isinstance(layer, nn.Linear) else torch.randn(2, layer.in_channels, 5, 5)
    assert beside(x).abs().max() < 1e-6


def test_more_ranks_than_a_layer_has_are_refused():
    with pytest.raises(UserError, match="rank 9 is more than a layer of 8 inputs.*8 or less"):
        OrthogonalLoRALayer(nn.Linear(8, 20), rank=9, alpha=9.0)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_items_of_a_batch_have_the_ranks_of_their_own_timesteps(
    tiny_config: dict, tiny_networks: dict, orthogonal: bool
):
    by_timestep = BY_TIMESTEP | {"orthogonal": orthogonal}
    module = build(tiny_config, tiny_networks, rank_by_timestep=by_timestep)
    prompts = ["a photo of sks disc", "a disc", "a photo of sks disc", ""]
    t, x = (
        torch.tensor([0, 300, 500, 999]),
        torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    )
    prediction = module.apply_model(x, t, module.condition(prompts))
    ranks = module.lora.masks.mask(t).sum(1).int().tolist()
    assert ranks == [4, 3, 2, 1]
    plain = build_module(tiny_config, seed=7)
    for k, rank in enumerate(ranks):
        weights = merged(module, tiny_networks, rank)
        for name in ("unet", "text_encoder"):
            plain.networks[name].load_state_dict(weights[name])
        with torch.no_grad():
            alone = plain.apply_model(x[k : k + 1], t[k : k + 1], plain.condition([prompts[k]]))
        torch.testing.assert_close(prediction[k : k + 1].detach(), alone, rtol=1e-4, atol=1e-5)


def gradients(module: LatentDiffusion, batch: dict) -> dict[str, Tensor]:
    module.setup("fit")
    module.loss_per_item(batch).sum().backward()
    return {name: p.grad for name, p in module.lora.named_parameters() if p.grad is not None}


def test_a_pass_of_the_teacher_and_computing_again_leave_the_gradient_alone(
    tiny_config: dict, tiny_networks: dict
):
    generator = torch.Generator().manual_seed(0)
    batch = {
        "latent_stats": torch.rand(4, 8, 8, 8, generator=generator),
        "caption": ["a photo of sks disc"] * 2 + ["a photo of a disc"] * 2,
        "stream": ["subject", "subject", "prior", "prior"],
        "item": torch.tensor([4, 5, 4, 5]),
    }
    found = []
    for again in (False, True):
        torch.manual_seed(1)  # what orthonormal factors begin as
        module = build_module(tiny_config, seed=7, trainable=node(), **TAUGHT)
        for name, network in module.networks.items():
            network.load_state_dict(tiny_networks[name].state_dict())
        module.networks["unet"].use_checkpoint = again
        found.append(gradients(randomized(module), batch))
    assert differences(*found) == [] and len(found[0]) > 100


@pytest.mark.parametrize("orthogonal", [False, True])
def test_samples_of_a_run_and_of_its_file_are_the_same(
    tiny_config: dict,
    tiny_networks: dict,
    tiny_model_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    orthogonal: bool,
):
    by_timestep = BY_TIMESTEP | {"orthogonal": orthogonal}
    module = build(tiny_config, tiny_networks, rank_by_timestep=by_timestep)
    how = {"steps": 3, "height": 16, "width": 16, "guidance_scale": 3.0, "seeds": [1, 2]}
    prompts = ["a disc", "", "a photo of sks disc"]  # a pass of other items before
    module.apply_model(torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), module.condition(prompts))
    live = text2image(module, size=16)("a photo of sks disc", **how)
    about = {"ldm.config": json.dumps(tiny_config)}
    with caplog.at_level(logging.INFO):
        module.export(tmp_path / "run" / "model.safetensors", dtype=torch.float32, metadata=about)
    assert "fewer ranks at noisier timesteps" in caplog.text and "as in other tools" in caplog.text
    file = tmp_path / "run" / "loras" / "run.safetensors"
    assert read_ranks(file) == {"rank": 4, "min_rank": 1, "timesteps": 1000}
    read = Text2Image.from_file(tiny_model_file, loras=[(file, 1.0)])("a photo of sks disc", **how)
    whole = Text2Image.from_file(tmp_path / "run" / "model.safetensors")("a photo of sks disc", **how)
    for one, other, full in zip(live, read, whole, strict=True):
        torch.testing.assert_close(one.latents, other.latents, rtol=1e-3, atol=1e-3)
        assert (one.latents - full.latents).abs().max() > 0.05
    state_dicts = open_model(tiny_model_file).state_dicts
    with caplog.at_level(logging.WARNING):
        convert.main(
            convert.parse([str(tiny_model_file), str(tmp_path / "all.safetensors"), "--lora", str(file)])
        )
    assert caplog.records[-1].message.endswith("all.safetensors has all ranks at all timesteps.")
    every = merge_lora(state_dicts, read_lora(file, state_dicts))
    expected = merged(module, tiny_networks, 4)
    name = "middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    torch.testing.assert_close(every["unet"][name], expected["unet"][name])


@pytest.mark.parametrize(
    "told", ["no json", "[1]", '{"rank": 4}', '{"rank": 2, "min_rank": 3, "timesteps": 9}']
)
def test_metadata_that_tells_no_ranks_is_refused(tmp_path: Path, told: str):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", metadata={KEY: told})
    with pytest.raises(UserError, match="does not tell ranks"):
        read_ranks(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "orthogonal, told, refused",
    [
        *((False, 4, False), (False, 3, True), (False, 8, True), (False, 1, True)),
        *((True, 4, False), (True, 3, True), (True, 2, True), (True, 16, True)),  # which have 8 rows
    ],
)
def test_metadata_of_another_rank_than_the_layers_is_refused(
    tiny_config: dict, tiny_networks: dict, tiny_model_file: Path, tmp_path: Path, orthogonal, told, refused
):
    """As a tool leaves a file that changes its rank and keeps its metadata."""
    module = build(tiny_config, tiny_networks, rank_by_timestep=BY_TIMESTEP | {"orthogonal": orthogonal})
    module.export(tmp_path / "run" / "model.safetensors", dtype=torch.float32, metadata={})
    file = tmp_path / "run" / "loras" / "run.safetensors"
    ranks = {"rank": told, "min_rank": 1, "timesteps": 1000}
    save_file(load_file(file), tmp_path / "odd.safetensors", metadata=ranks_metadata(ranks))
    if not refused:
        Text2Image.from_file(tiny_model_file, loras=[(tmp_path / "odd.safetensors", 1.0)])
        return
    with pytest.raises(UserError, match=rf"tells of rank {told}, and there are layers of rank .*odd\.safe"):
        Text2Image.from_file(tiny_model_file, loras=[(tmp_path / "odd.safetensors", 1.0)])


def test_without_layers_of_the_unet_it_is_refused(tiny_config: dict):
    with pytest.raises(UserError, match="Only the UNet has timesteps"):
        build_module(tiny_config, trainable=node(unet=[]))
    with pytest.raises(UserError, match="more than the LoRA's 2"):
        build_module(tiny_config, trainable=node(rank=2, rank_by_timestep={"min_rank": 3}))


def test_a_compiled_network_has_the_ranks_too(tiny_config: dict, tiny_networks: dict):
    module = build(tiny_config, tiny_networks)
    graph = TrainingGraph(module.networks["unet"], backend="eager")
    x, told = torch.randn(2, 4, 8, 8), module.condition(["a photo of sks disc", "a disc"])
    for t in (torch.tensor([0, 999]), torch.tensor([500, 0])):
        expected = module.networks["unet"].predict(x, t, told)
        torch.testing.assert_close(graph.predict(x, t, told), expected)


def test_it_resumes_to_the_bit_and_its_checkpoint_is_a_model(job: Job, tmp_path: Path):
    job = replace(job, accumulate=2, data={"prior_caption_dropout": 0.5})
    params = TAUGHT | {"trainable": node()}
    whole = job(tmp_path / "whole", params=params)
    with pytest.raises(Killed):
        job(tmp_path / "again", callbacks=[At(3, kill)], params=params)
    again = job(tmp_path / "again", params=params)
    assert differences(state_of(tmp_path / "whole", 4), state_of(tmp_path / "again", 4)) == []
    assert differences(whole.state_dict(), again.state_dict()) == []
    assert isinstance(whole.lora, LoRA) and whole.lora.masks.ranks["timesteps"] == 1000
