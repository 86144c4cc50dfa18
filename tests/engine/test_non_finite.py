"""A loss or gradient that is not finite ends the run and names the items; fp16 skips are counted."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch

from ldm.engine.non_finite import MOST_SKIPS, AsyncHostCopy, NonFiniteGuard, Step
from ldm.errors import UserError
from ldm.randomness import ItemRNG
from tests.short_runs import Job


class Spoil(pl.Callback):
    """Makes a batch or a gradient not finite at one step; batches of 2 subject items."""

    def __init__(self, step: int, *, gradient: bool = False):
        self.step, self.gradient = step, gradient

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: dict, batch_idx: int
    ) -> None:
        if batch_idx == self.step and not self.gradient:
            batch["latent_stats"][1] = torch.nan

    def on_after_backward(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.global_step == self.step and self.gradient:
            next(p for p in module.parameters() if p.grad is not None).grad[0] = torch.inf


def test_a_loss_names_its_item_and_timestep(job: Job, tmp_path: Path):
    ItemRNG(7, [(5, "subject")]).randint("timestep", 1000, timestep := torch.empty(1, dtype=torch.int64))
    with pytest.raises(UserError) as error:
        job(tmp_path, callbacks=[Spoil(2)])
    assert error.value.what == "The loss of step 2 is not finite"
    assert error.value.where == f"subject item 5 at timestep {timestep.item()}"
    assert "learning rate" in error.value.remedy
    names = {path.name for path in (tmp_path / "checkpoints").glob("*.ckpt")}
    assert names == {"step-00000001.ckpt", "step-00000002.ckpt"}  # before it; none was lost
    for path in (tmp_path / "checkpoints").glob("*.ckpt"):
        assert all(x.isfinite().all() for x in torch.load(path)["state_dict"].values())


def test_a_loss_of_a_whole_batch_names_all_its_items():
    """As that of a judge's or an autoencoder's training, whose items have no loss of their own."""
    guard, bad = NonFiniteGuard(), AsyncHostCopy(torch.tensor([False]))
    guard._done.append(Step(4, [(8, "picture"), (9, "picture")], [bad]))
    trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=None))
    with pytest.raises(UserError, match="loss of step 4 is not finite .*picture item 8, picture item 9"):
        guard.check_steps(trainer, pl.LightningModule())


def test_a_gradient_names_all_items_of_its_step(job: Job, tmp_path: Path):
    with pytest.raises(UserError, match="gradient of step 3 .*subject item 6 at .*subject item 7 at"):
        job(tmp_path, callbacks=[Spoil(3, gradient=True)])
    assert not (tmp_path / "checkpoints" / "step-00000004.ckpt").exists()


def overflows(guard: NonFiniteGuard, count: int, *, scaler: object) -> None:
    """So many steps in a row whose gradient overflows while the loss is finite."""
    trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler))
    module = pl.LightningModule()
    for number in range(count):
        fine, bad = AsyncHostCopy(torch.tensor([True])), AsyncHostCopy(torch.tensor([False]))
        guard._done.append(Step(number, [(number, "subject")], [fine], bad))
        guard.check_steps(trainer, module)


def test_a_scaler_may_skip_some_steps_but_not_all(caplog: pytest.LogCaptureFixture):
    guard = NonFiniteGuard()
    with caplog.at_level(logging.WARNING):
        overflows(guard, 3, scaler=object())
    assert guard.skipped == 3 and "Step 2: the gradient overflows in half precision; skipped" in caplog.text
    again = NonFiniteGuard()
    again.load_state_dict(guard.state_dict())
    assert again.skipped == 3
    with pytest.raises(UserError, match=f"gradient of step {MOST_SKIPS} is not finite"):
        overflows(NonFiniteGuard(), MOST_SKIPS + 1, scaler=object())
    with pytest.raises(UserError, match="gradient of step 0"):
        overflows(NonFiniteGuard(), 1, scaler=None)
