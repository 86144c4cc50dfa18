"""The training step: its loss in closed form, its draws by item, its optimizer groups."""

import pytest
import torch
from torch import Tensor

from ldm import randomness
from ldm.checkpoints.layout import PREFIXES
from ldm.models.conditioning import Conditioning
from ldm.optim.optimizers import build_optimizer
from ldm.training.latent_diffusion import LatentDiffusion
from tests.factories import build_module


@pytest.fixture
def module(tiny_config: dict, tiny_networks: dict) -> LatentDiffusion:
    module = build_module(tiny_config, seed=7, objective={"prior_loss_weight": 0.5})
    for name, network in module.networks.items():
        network.load_state_dict(tiny_networks[name].state_dict())
    return module


@pytest.fixture
def batch() -> dict:
    generator = torch.Generator().manual_seed(0)
    latent_stats = torch.randn(4, 8, 8, 8, generator=generator)
    latent_stats[:, 4:].abs_()
    return {
        "latent_stats": latent_stats,
        "caption": ["a photo of sks disc"] * 2 + ["a photo of a disc"] * 2,
        "stream": ["subject", "subject", "prior", "prior"],
        "item": torch.tensor([4, 5, 4, 5]),
    }


def one_item(batch: dict, k: int) -> dict:
    return {key: value[k : k + 1] for key, value in batch.items()}


def reference_loss(module: LatentDiffusion, batch: dict, k: int) -> Tensor:
    """The loss of item k, by hand."""
    part, item = batch["stream"][k], int(batch["item"][k])
    draw = {p: randomness.generator(7, item, f"{part}/{p}") for p in ("posterior", "noise", "timestep")}
    mean, std = batch["latent_stats"][k].chunk(2)
    x0 = mean + std * torch.randn(mean.shape, generator=draw["posterior"])
    noise = torch.randn(mean.shape, generator=draw["noise"])
    t = torch.randint(1000, (1,), generator=draw["timestep"])
    noisy = module.process.add_noise(x0[None], noise[None], t)
    context = module.cond_stage_model(module.cond_stage_model.tokenize([batch["caption"][k]]))
    return (module.apply_model(noisy, t, Conditioning(context)) - noise).square().mean()


def test_loss_is_subject_mean_plus_weighted_prior_mean(module: LatentDiffusion, batch: dict):
    losses = [reference_loss(module, batch, k) for k in range(4)]
    expected = (losses[0] + losses[1]) / 2 + 0.5 * (losses[2] + losses[3]) / 2
    torch.testing.assert_close(module.training_step(batch, 0), expected, rtol=1e-5, atol=0)


def test_an_item_draws_the_same_alone_and_differs_between_the_parts(module: LatentDiffusion, batch: dict):
    together = module.loss_per_item(batch)
    alone = torch.cat([module.loss_per_item(one_item(batch, k)) for k in range(4)])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=0)
    other_part = one_item(batch, 0) | {"stream": ["prior"]}
    assert not torch.allclose(module.loss_per_item(other_part), together[:1], rtol=1e-3)


def test_frozen_parts_get_no_gradient(tiny_config: dict, batch: dict):
    module = build_module(tiny_config, trainable={"text_encoder": False})
    module.training_step(batch, 0).backward()
    assert all(p.grad is None for p in module.cond_stage_model.parameters())
    assert all(p.grad is None for p in module.networks["vae"].parameters())
    assert any(p.grad is not None for p in module.networks["unet"].parameters())
    module.train()
    assert module.networks["unet"].training and not module.networks["vae"].training


def test_state_dict_has_the_names_of_a_released_file(module: LatentDiffusion):
    assert {name for name in module.state_dict() if not name.startswith(tuple(PREFIXES.values()))} == set()
    assert "cond_stage_model.transformer.text_model.final_layer_norm.weight" in module.state_dict()


def test_each_part_has_its_learning_rate(module: LatentDiffusion):
    parts = {"unet": (module.networks["unet"], 1e-3), "text_encoder": (module.cond_stage_model, 1e-5)}
    groups = build_optimizer(parts).param_groups
    assert [(group["name"], group["lr"]) for group in groups] == [("unet", 1e-3), ("text_encoder", 1e-5)]
