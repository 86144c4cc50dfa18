"""use_checkpoint: null is decided by the free memory, before training, and changes no result."""

import copy
import logging

import pytest
import torch

from ldm.engine.device import free_memory, peak_memory_mib
from ldm.engine.peak import reset_peak_memory
from ldm.runs import job, recompute
from ldm.runs.memory import estimate
from ldm.runs.options import parse
from ldm.runs.recompute import MARGIN, with_checkpointing_chosen
from ldm.runs.run import PhaseTimer
from ldm.schema import RunConfig
from tests.factories import build_module
from tests.runs.test_memory import config_of

CPU = torch.device("cpu")


def chosen_in(config: RunConfig) -> list:
    params = config.model["params"]
    return [params[name]["params"].get("use_checkpoint") for name in ("unet", "text_encoder")]


def undecided(tiny_config: dict) -> RunConfig:
    for name in ("unet", "text_encoder"):
        tiny_config[name]["params"]["use_checkpoint"] = None
    return config_of(tiny_config)


@pytest.mark.parametrize("enough", [True, False])
def test_the_free_memory_decides(
    tiny_config: dict, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, enough: bool
):
    """By what the estimate says of the training without; the estimate then says what was chosen."""
    config = undecided(tiny_config)
    kept = copy.deepcopy(config)
    needed = MARGIN * sum(need.total for need in estimate(config)[0].values())
    monkeypatch.setattr(recompute, "free_memory", lambda device: int(needed) + (1 if enough else -1))
    with caplog.at_level(logging.INFO):
        chosen = with_checkpointing_chosen(config, CPU)
    assert config == kept
    assert chosen_in(chosen) == ([False, False] if enough else [True, True])
    assert f"use_checkpoint: {str(not enough).lower()}. Without it training takes" in caplog.text
    activations = {
        name: estimate(c)[0]["unet"].activations for name, c in (("null", config), ("chosen", chosen))
    }
    assert (activations["null"] == activations["chosen"]) == enough
    assert build_module(chosen.model["params"]).networks["unet"].use_checkpoint is not enough


def test_the_process_with_the_least_memory_decides_for_all(
    tiny_config: dict, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(recompute.distributed, "all_gather_object", lambda value: [value, 0])
    assert chosen_in(with_checkpointing_chosen(undecided(tiny_config), CPU)) == [True, True]


@pytest.mark.parametrize("given", [True, False, [1, 2]])
def test_what_is_set_stays(tiny_config: dict, monkeypatch: pytest.MonkeyPatch, given: bool | list):
    monkeypatch.setattr(recompute, "free_memory", lambda device: 0)
    undecided(tiny_config)
    tiny_config["unet"]["params"]["use_checkpoint"] = given
    assert chosen_in(with_checkpointing_chosen(config_of(tiny_config), CPU)) == [given, True]
    del tiny_config["text_encoder"]["params"]["use_checkpoint"]
    config = config_of(tiny_config)
    assert with_checkpointing_chosen(config, CPU) == config


def test_the_plan_says_what_would_be_chosen(monkeypatch: pytest.MonkeyPatch):
    config = parse(["--base", "configs/dreambooth.yaml", "model.params.unet.params.use_checkpoint=null"])
    monkeypatch.setattr(recompute, "free_memory", lambda device: 0)
    assert "use_checkpoint, by the free memory of" in (text := job.plan(config)) and ": true\n" in text
    monkeypatch.undo()
    assert "by the free memory" not in job.plan(parse(["--base", "configs/dreambooth.yaml"]))


def test_stable_diffusion_leaves_it_to_the_memory():
    for name in ("sd1", "sd2"):
        config = parse(["--base", f"configs/dreambooth-{name}.yaml"])
        assert chosen_in(config) == [None, None]


@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "bf16-mixed"])
def test_computing_again_changes_no_bit(tiny_config: dict, tiny_networks: dict, mixed: bool):
    """Loss and gradients; so a run may be taken up with the other choice."""

    def gradients(chosen: bool | None) -> list[torch.Tensor]:
        for name in ("unet", "text_encoder"):
            tiny_config[name]["params"]["use_checkpoint"] = chosen
        module = build_module(tiny_config, seed=7)
        for name, network in module.networks.items():
            network.load_state_dict(tiny_networks[name].state_dict())
        batch = {
            "latent_stats": torch.ones(2, 8, 8, 8),
            "caption": ["a photo of sks disc", "a photo of a disc"],
            "stream": ["subject", "prior"],
            "item": torch.tensor([1, 1]),
        }
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = module.training_step(batch, 0)
        loss.backward()
        return [loss.detach(), *(p.grad for p in module.parameters() if p.grad is not None)]

    kept, again, undecided = (gradients(chosen) for chosen in (False, True, None))
    assert len(kept) > 100
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept, undecided, strict=True))


def test_what_is_free_is_less_than_the_machine_has():
    with open("/proc/meminfo") as file:
        total = 1024 * int(file.readline().split()[1])
    assert 0 < free_memory(CPU) < total


@pytest.mark.skipif(not reset_peak_memory(), reason="the system cannot set the peak back")
def test_each_phase_has_its_own_peak():
    watch = PhaseTimer()
    for phase, mib in (("small", 10), ("large", 300), ("small again", 10)):
        with watch(phase):
            torch.ones(mib * 2**18)
    assert watch.peak_mib["large"] > watch.peak_mib["small"] + 250
    assert watch.peak_mib["large"] > watch.peak_mib["small again"] + 250
    assert watch.seconds.keys() == watch.peak_mib.keys()
    assert peak_memory_mib() == pytest.approx(watch.peak_mib["small again"], rel=0.2)
