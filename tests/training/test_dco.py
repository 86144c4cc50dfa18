"""Direct consistency optimization: its formula, and what it is at the start."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ldm.config import check
from ldm.errors import UserError
from ldm.runs.memory import estimate
from ldm.schema import RunConfig
from ldm.training.dco import DCO
from ldm.training.latent_diffusion import LatentDiffusion
from tests.factories import MIN_SNR, TAUGHT, build_module, run_config
from tests.short_runs import At, Job, Killed, curves_of, differences, kill, state_of

NODE = {"target": "ldm.training.dco.DCO", "params": {"beta": 50.0}}
LORA = {"lora": {"target": "ldm.models.lora.LoRA", "params": {"rank": 2}}}
SAME = ["a photo of sks disc"] * 2
OF_CLASS = ["a photo of a disc"] * 2


def build(config: dict, networks: dict[str, nn.Module], **objective: object) -> LatentDiffusion:
    module = build_module(config, seed=7, objective=objective)
    for name, network in module.networks.items():
        network.load_state_dict(networks[name].state_dict())
    module.setup("fit")
    return module


def batch(class_caption: list[str]) -> dict:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(4, 4, 8, 8, generator=generator)
    return {
        "latent_stats": torch.cat([mean, torch.zeros_like(mean)], 1),
        "caption": SAME + OF_CLASS,
        "class_caption": class_caption + OF_CLASS,
        "stream": ["subject", "subject", "prior", "prior"],
        "item": torch.tensor([4, 5, 4, 5]),
    }


def moved(module: LatentDiffusion) -> LatentDiffusion:
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter += 0.002
    return module


@pytest.mark.parametrize("weighting", [None, MIN_SNR], ids=["equal", "min-snr"])
@pytest.mark.parametrize("told", [SAME, OF_CLASS], ids=["the same", "the class"])
def test_it_is_its_formula(tiny_config: dict, tiny_networks: dict, weighting: dict | None, told: list[str]):
    plain = build(tiny_config, tiny_networks, weighting=weighting)
    module = build(tiny_config, tiny_networks, weighting=weighting, subject_loss=NODE, prior_target="teacher")
    taught = build(tiny_config, tiny_networks, weighting=weighting, prior_target="teacher")
    with torch.no_grad():
        base = plain.loss_per_item(batch(told) | {"caption": told + OF_CLASS})[:2]
        own, losses = (moved(one).loss_per_item(batch(told)) for one in (plain, module))
        expected = [
            -2 / 50 * math.log(1 / (1 + math.exp(50 * float(one - other))))
            for one, other in zip(own[:2], base, strict=True)
        ]
        assert losses[:2].tolist() == pytest.approx(expected, rel=1e-4)
        assert torch.equal(losses[2:], moved(taught).loss_per_item(batch(told))[2:])


def test_at_the_start_its_gradient_is_that_of_the_squared_error(tiny_config: dict, tiny_networks: dict):
    plain, module = build(tiny_config, tiny_networks), build(tiny_config, tiny_networks, subject_loss=NODE)
    losses = [one.loss_per_item(batch(SAME))[:2].mean() for one in (plain, module)]
    assert float(losses[1]) == pytest.approx(2 / 50 * math.log(2), rel=1e-5)
    gradients = [
        torch.autograd.grad(loss, one.networks["unet"].out[2].weight)[0]
        for loss, one in zip(losses, (plain, module), strict=True)
    ]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)


def test_far_ahead_of_the_base_there_is_hardly_any_gradient():
    error = torch.tensor([0.4, 0.6, 0.5], requires_grad=True)
    loss: Tensor = DCO(beta=1000.0).compare(error, torch.full((3,), 0.5))
    loss.sum().backward()
    assert error.grad.tolist() == pytest.approx([0.0, 2.0, 1.0], abs=1e-6)


@pytest.mark.parametrize("trainable", [{}, LORA], ids=["full", "lora"])
def test_it_resumes_to_the_bit(job: Job, tmp_path, trainable: dict):
    job = replace(job, data={"prior_caption_dropout": 0.5})
    params = {"objective": TAUGHT["objective"] | {"subject_loss": NODE}, "trainable": trainable}
    whole = job(tmp_path / "whole", params=params)
    with pytest.raises(Killed):
        job(tmp_path / "again", callbacks=[At(2, kill)], params=params)
    again = job(tmp_path / "again", params=params)
    assert differences(state_of(tmp_path / "whole", 4), state_of(tmp_path / "again", 4)) == []
    assert differences(whole.state_dict(), again.state_dict()) == []
    assert curves_of(tmp_path / "whole") == curves_of(tmp_path / "again")


@pytest.mark.parametrize("lora", [False, True])
def test_the_forecast_counts_a_copy_of_the_base_but_beside_a_lora(
    tiny_config: dict, tiny_model_file, subject_folder, lora: bool
):
    def copies(**objective: object) -> int:
        node = run_config(tiny_config, base=tiny_model_file, subject=subject_folder, name="x")
        node["model"]["params"] |= {"objective": objective, "trainable": LORA if lora else {}}
        node["trainer"]["max_steps"] = 1
        needs, _ = estimate(RunConfig.parse(node))
        return needs["copies of the base"].weights if "copies of the base" in needs else 0

    assert copies() == 0
    assert copies(subject_loss=NODE) == copies(prior_target="teacher")
    assert (copies(subject_loss=NODE) == 0) == (copies(l2_sp_weight=0.1) == 0) == lora


def test_another_class_is_refused(tiny_config: dict):
    target = "ldm.training.latent_diffusion.LatentDiffusion"
    node = {"target": target, "params": tiny_config | {"objective": {"subject_loss": MIN_SNR}}}
    with pytest.raises(UserError, match="MinSNR is no AgainstBase"):
        check({"model": node}, {"model": dict})
