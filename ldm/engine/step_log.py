"""When a training step logs, at which step, and what: the mean over its micro-batches."""

from collections.abc import Mapping

import pytorch_lightning as pl
from torch import Tensor


class StepOfLogs(pl.Callback):
    """Sets the step of logs, which Lightning guesses on resuming: with one optimizer it is the global step.

    It comes before all callbacks that log.
    """

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: dict, batch_idx: int
    ) -> None:
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


class StepMean:
    """Means over the micro-batches of an optimizer step, which all are of one size."""

    def __init__(self) -> None:
        self.count = 0
        self.means: dict[str, Tensor] = {}

    def __call__(self, values: Mapping[str, Tensor], *, begins: bool) -> dict[str, Tensor]:
        """Values of a micro-batch -> their means so far; the logger writes those of the last one.

        begins: whether it is the first micro-batch of its step.
        """
        self.count = 1 if begins else self.count + 1
        values = {name: value.detach() for name, value in values.items()}
        if begins:
            self.means = values
        else:
            self.means = {
                name: mean + (values[name] - mean) / self.count for name, mean in self.means.items()
            }
        return self.means


def begins_step(module: pl.LightningModule, micro_batch: int) -> bool:
    """Whether this micro-batch is the first of its optimizer step; without a Trainer each is a step."""
    trainer = module._trainer
    return trainer is None or micro_batch % trainer.accumulate_grad_batches == 0


def is_logged(module: pl.LightningModule) -> bool:
    """Whether the Trainer writes what this step logs.

    Logging costs host time at every step, and a reduction over processes; Lightning writes every
    `log_every_n_steps`. Without a Trainer there is nothing to spare.
    """
    trainer = module._trainer
    if trainer is None:
        return True
    every = trainer.log_every_n_steps
    return trainer.should_stop or (every > 0 and (trainer.global_step + 1) % every == 0)
