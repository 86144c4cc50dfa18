"""A run that goes on with another config: the new values act from its next step on, or are refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from ldm.engine import resume
from ldm.errors import UserError
from ldm.optim.optimizer_nodes import FUSED_BACKWARD, SHORT
from ldm.optim.optimizers import lr_factor
from ldm.optim.schedules import SHORT as SCHEDULES
from ldm.optim.schedules import build_schedule
from tests.factories import LEAN
from tests.short_runs import Job, differences, state_of

LORA = {"target": "ldm.models.lora.LoRA", "params": {"rank": 2}}


class Steps(pl.Callback):
    """What the optimizer's groups hold at each step that it takes, by step and group."""

    def __init__(self) -> None:
        self.groups: dict[int, dict[str, dict]] = {}

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer) -> None:
        self.groups[trainer.global_step] = {
            group["name"]: {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        }


def warm(schedule: str, steps: int) -> dict:
    kind = SCHEDULES[schedule]
    return {"target": f"{kind.__module__}.{kind.__name__}", "params": {"warmup_steps": steps}}


def steps_of(job: Job, folder: Path, *, steps: int, **params) -> dict[int, dict[str, dict]]:
    seen = Steps()
    replace(job, steps=steps)(folder, params=params, callbacks=[seen])
    return seen.groups


@pytest.mark.parametrize(
    "schedule, optimizer", [("constant", "adamw_bf16"), ("cosine", "adamw"), ("wsd", "adamw")]
)
def test_what_a_resumed_optimizer_holds_is_what_the_new_config_says(
    job: Job, tmp_path: Path, schedule: str, optimizer: str
):
    rates = {"trainable": {"learning_rate": 1e-4, "text_encoder_learning_rate": 3e-5}}
    changed = {"target": SHORT[optimizer], "params": {"betas": [0.8, 0.9], "weight_decay": 0.2}}
    steps_of(job, tmp_path, steps=2, lr_schedule=warm(schedule, 1), optimizer=optimizer)
    seen = steps_of(job, tmp_path, steps=6, lr_schedule=schedule, optimizer=changed, **rates)
    factor = lr_factor(build_schedule(schedule), max_steps=6)
    assert set(seen) == {2, 3, 4, 5}
    for step, groups in seen.items():
        for name, rate in {"unet": 1e-4, "text_encoder": 3e-5}.items():
            assert groups[name]["lr"] == pytest.approx(rate * factor(step), rel=1e-12)
            assert tuple(groups[name]["betas"]) == (0.8, 0.9) and groups[name]["weight_decay"] == 0.2


@pytest.mark.parametrize("change", [{"trainable": {"lora": LORA}}, {"optimizer": LEAN}], ids=["lora", "lean"])
def test_every_way_of_stepping_takes_the_new_rate(job: Job, tmp_path: Path, change: dict):
    """With a rate of almost nothing the weights stay where the resumed run found them."""
    replace(job, steps=2)(tmp_path, params=change)
    for steps, rate in ((4, 1e-12), (5, 1e-2)):
        trainable = {**change.get("trainable", {}), "learning_rate": rate}
        replace(job, steps=steps)(tmp_path, params={**change, "trainable": trainable}, checkpoints_kept=3)
    before, after, moved = (state_of(tmp_path, step)["state_dict"] for step in (2, 4, 5))
    assert max(float((after[k] - before[k]).abs().max()) for k in before) < 1e-9
    assert max(float((moved[k] - after[k]).abs().max()) for k in after) > 1e-4


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_finished_run_that_is_extended_never_steps_at_rate_0(job: Job, tmp_path: Path, schedule: str):
    steps_of(job, tmp_path, steps=3, lr_schedule=schedule)
    seen = steps_of(job, tmp_path, steps=6, lr_schedule=schedule)
    factor = lr_factor(build_schedule(schedule), max_steps=6)
    assert [groups["unet"]["lr"] for groups in seen.values()] == [1e-3 * factor(k) for k in (3, 4, 5)]
    assert min(groups["unet"]["lr"] for groups in seen.values()) > 0


def test_an_extended_run_has_the_rates_of_one_that_was_long_from_the_start(job: Job, tmp_path: Path):
    """To the bit, from the same weights on: the schedule is a function of the step and of the config."""
    cosine = {"lr_schedule": warm("cosine", 2)}
    whole = steps_of(job, tmp_path / "whole", steps=5, **cosine)
    steps_of(job, tmp_path / "again", steps=3, **cosine)
    again = steps_of(job, tmp_path / "again", steps=5, **cosine)
    assert {step: whole[step] for step in again} == again
    states = [state_of(tmp_path / name, 5) for name in ("whole", "again")]
    assert differences(*[state["lr_schedulers"] for state in states]) == []


def config(**params) -> dict:
    ema_decay = params.pop("ema_decay", None)
    return {"name": "run", "ema_decay": ema_decay, "model": {"params": params}}


@pytest.mark.parametrize(
    "before, after, key",
    [
        (config(), config(optimizer="adamw_bf16"), "model.params.optimizer"),
        (config(optimizer="adamw_8bit"), config(optimizer="adamw"), "model.params.optimizer"),
        (config(optimizer="adamw_8bit"), config(), "model.params.optimizer"),
        (config(optimizer={"target": "torch.optim.SGD"}), config(optimizer=LEAN), "model.params.optimizer"),
        (config(ema_decay=0.9), config(), "ema_decay"),
    ],
)
def test_what_a_checkpoint_cannot_follow_is_refused_by_its_key(tmp_path: Path, before, after, key):
    for allowed in (True, False):
        with pytest.raises(UserError, match=f"{key} cannot change.*Restore {key}="):
            resume.check_changes(before, after, allowed=allowed, run=tmp_path)


def test_what_says_the_same_in_other_words_is_no_other_optimizer(tmp_path: Path):
    resume.check_changes(config(), config(optimizer="adamw"), allowed=True, run=tmp_path)
    for same in (LEAN, {"target": SHORT["adamw"]}, {"target": FUSED_BACKWARD}):
        resume.check_changes(config(), config(optimizer=same), allowed=True, run=tmp_path)
    resume.check_changes(config(), config(ema_decay=0.9), allowed=True, run=tmp_path)
    resume.check_changes(config(ema_decay=0.9), config(ema_decay=0.99), allowed=True, run=tmp_path)


def test_weights_of_an_average_go_on_under_another_decay(job: Job, tmp_path: Path):
    replace(job, steps=2)(tmp_path, ema_decay=0.5)
    replace(job, steps=3)(tmp_path, ema_decay=0.0)  # of the last step's weights alone
    state = state_of(tmp_path, 3)
    live = {name: value for name, value in state["current_model_state"].items() if "diffusion" in name}
    assert all(torch.equal(state["state_dict"][name], value) for name, value in live.items())
