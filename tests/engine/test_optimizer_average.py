"""Schedule-free optimizers: gradients at y, what is looked at is the average x, exact on resume."""

from dataclasses import replace
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from schedulefree import AdamWScheduleFreeReference
from torch import Tensor, nn

from ldm.engine.averaging import evaluated_weights
from ldm.errors import UserError
from ldm.optim.optimizer_nodes import averages_weights
from ldm.optim.optimizers import build_optimizer
from ldm.runs.validate import validate
from ldm.schema import RunConfig
from tests.factories import run_config
from tests.short_runs import At, Job, Killed, curves_of, differences, kill, state_of

NODE = {"target": "schedulefree.AdamWScheduleFree", "params": {"betas": [0.9, 0.99], "weight_decay": 0.1}}
PARAMS = {"optimizer": NODE}


def learning(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


class Look(pl.Callback):
    """Weights and z after each step, and the weights of validations and of what is evaluated beside them."""

    def __init__(self) -> None:
        self.trained: dict[int, dict[str, Tensor]] = {}
        self.averages: dict[int, dict[str, Tensor]] = {}
        self.validated: dict[int, dict[str, Tensor]] = {}
        self.evaluated: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *rest: object) -> None:
        step = trainer.global_step
        self.trained[step] = learning(module)
        states = trainer.optimizers[0].state
        self.averages[step] = {  # y = b x + (1 - b) z (Defazio et al. 2024, eq. 3)
            name: (p.detach() - 0.1 * states[p]["z"]) / 0.9
            for name, p in module.named_parameters()
            if p.requires_grad
        }
        with evaluated_weights(trainer):
            self.evaluated[step] = learning(module)
        assert differences(learning(module), self.trained[step]) == []

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.validated[trainer.global_step] = learning(module)


def test_what_is_looked_at_and_exported_is_the_average(job: Job, tmp_path: Path):
    look = Look()
    module = job(tmp_path, params=PARAMS, callbacks=[look])
    assert set(look.validated) == {2, 4} and set(look.averages) == {1, 2, 3, 4}
    for step, found in (look.evaluated | look.validated).items():
        for name, value in found.items():
            torch.testing.assert_close(value, look.averages[step][name], rtol=1e-5, atol=1e-6)
    assert differences(look.validated[2], look.evaluated[2]) == []
    assert differences(learning(module), look.evaluated[4]) == []
    assert any(not torch.equal(look.trained[4][name], value) for name, value in look.evaluated[4].items())
    state = state_of(tmp_path, 4)
    assert (
        differences({name: state["state_dict"][name] for name in look.evaluated[4]}, look.evaluated[4]) == []
    )
    live = {name: state["current_model_state"][name] for name in look.trained[4]}
    assert differences(live, look.trained[4]) == []
    frozen = "first_stage_model.quant_conv.weight"
    pointers = {state[kind][frozen].data_ptr() for kind in ("state_dict", "current_model_state")}
    assert len(pointers) == 1  # written once


def test_looking_changes_no_bit_of_what_is_trained(job: Job, tmp_path: Path):
    """Validations, previews and checkpoints come and go; neither weights nor z notice."""
    job(tmp_path / "looked", params=PARAMS, callbacks=[Look()])
    unseen = {"val_check_interval": None}
    job(tmp_path / "unseen", params=PARAMS, checkpoint_every=4, trainer=unseen)
    states = [state_of(tmp_path / name, 4) for name in ("looked", "unseen")]
    for key in ("state_dict", "current_model_state", "optimizer_states"):
        assert differences(*[state[key] for state in states]) == []


@pytest.mark.parametrize("lora", [False, True])
def test_killed_in_any_micro_batch_it_is_the_run_that_never_stopped(job: Job, tmp_path: Path, lora: bool):
    node = {"target": "ldm.models.lora.LoRA", "params": {"rank": 2}}
    params = PARAMS | ({"trainable": {"lora": node}} if lora else {})
    job = replace(job, accumulate=2)
    whole = job(tmp_path / "whole", params=params)
    for micro_batch in [6] if lora else [1, 5]:
        with pytest.raises(Killed):
            job(tmp_path / "again", callbacks=[At(micro_batch, kill)], params=params)
    again = job(tmp_path / "again", params=params)
    assert differences(state_of(tmp_path / "whole", 4), state_of(tmp_path / "again", 4)) == []
    assert differences(whole.state_dict(), again.state_dict()) == []
    assert curves_of(tmp_path / "again") == curves_of(tmp_path / "whole")
    done = job(tmp_path / "again", params=params)  # all steps are there: nothing but the result is read
    assert differences(whole.state_dict(), done.state_dict()) == []


def test_it_is_the_authors_average():
    """x of their reference, which keeps it apart; ours is what `eval` puts into the weights."""
    nets = [nn.Linear(3, 2) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    ours = build_optimizer({"net": (nets[0], 1e-2)}, NODE)
    theirs = AdamWScheduleFreeReference(nets[1].parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    for optimizer in (ours, theirs):
        optimizer.train()
    for step in range(5):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        for net, optimizer in zip(nets, (ours, theirs), strict=True):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    for optimizer in (ours, theirs):
        optimizer.eval()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_which_optimizers_average():
    for node in ("schedule_free", NODE, {"target": "schedulefree.SGDScheduleFree"}):
        assert averages_weights(node)
    for node in ("adamw", "adamw_8bit", "adamw_bf16", "adamw_bf16_moments", "adafactor", "lion", "prodigy"):
        assert not averages_weights(node)


@pytest.mark.parametrize(
    "change, key",
    [
        ("ema_decay=0.9", "ema_decay"),
        ("model.params.lr_schedule=cosine", "model.params.lr_schedule"),
        ("model.params.lr_schedule=rex", "model.params.lr_schedule"),
    ],
)
def test_a_second_average_or_a_decay_is_refused(
    workdir: Path, tiny_config: dict, tiny_model_file: Path, subject_folder: Path, change: str, key: str
):
    place = {"base": tiny_model_file, "subject": subject_folder, "name": "one"}
    config = run_config(tiny_config, **place, trainer={"max_steps": 2})
    config["model"]["params"]["optimizer"] = "schedule_free"
    validate(RunConfig.parse(config))
    name, _, value = change.partition("=")
    section = config if "." not in name else config["model"]["params"]
    section[name.rpartition(".")[2]] = 0.9 if name == "ema_decay" else value
    with pytest.raises(UserError, match=key):
        validate(RunConfig.parse(config))
