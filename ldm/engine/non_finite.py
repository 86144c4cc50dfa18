"""Stops a run at a non-finite loss or gradient, and names its items."""

import logging
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from ldm.engine.device import is_awaited
from ldm.engine.gradients import gradient_norm
from ldm.errors import UserError
from ldm.randomness import ItemRNG, stream_ids

log = logging.getLogger(__name__)

MOST_SKIPS = 30  # consecutive fp16 steps: the loss scale has then gone from 65536 to below 0.0001


class NonFiniteError(UserError):
    """A loss or a gradient is not finite: the settings are at fault, not the machine."""


class HasItems(Protocol):
    """A module whose batches are numbered items, each with a loss and a timestep of its own."""

    item_losses: Tensor  # [B], of the last batch
    process: Any  # a `NoiseProcess`
    seed: int


def has_items(module: pl.LightningModule) -> TypeGuard[HasItems]:
    """Whether a module's batches are numbered items.

    `isinstance` of a protocol does not see submodules, parameters and buffers, from Python 3.12 on.
    """
    return all(hasattr(module, name) for name in HasItems.__annotations__)


class AsyncHostCopy:
    """Asynchronous device-to-host copy; `read` waits for the copy, not for later work of the device."""

    def __init__(self, values: Tensor):
        self._host = values.detach().to("cpu", non_blocking=is_awaited(values.device))
        self._copied = torch.cuda.Event() if values.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def read(self) -> list[bool]:
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.tolist()


@dataclass
class Step:
    """Whether the losses and the gradient of one optimizer step are finite."""

    number: int
    items: list[tuple[int, str]]
    # Of each micro-batch: whether the loss of each item is finite [B], or the mean [1]
    losses: list[AsyncHostCopy]
    gradient: AsyncHostCopy | None = None


class NonFiniteGuard(pl.Callback):
    """Raises UserError at a non-finite loss or gradient; nothing waits for the device.

    Each step is checked one step later, and all of them before a checkpoint is written. With a loss scaler
    (fp16) steps whose gradient overflows are skipped by the scaler and counted (`train/skipped_steps`); the
    run ends after MOST_SKIPS of them in a row.
    """

    def __init__(self) -> None:
        self.skipped, self._in_a_row = 0, 0
        self._running: Step | None = None
        self._done: list[Step] = []

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        norm = gradient_norm(trainer, optimizer)
        if norm is not None:
            self._now(trainer.global_step).gradient = AsyncHostCopy(norm.isfinite()[None])

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: dict, batch: dict, batch_idx: int
    ) -> None:
        ends = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        step = self._now(trainer.global_step - int(ends))
        step.items += batch["stream_ids"] if "stream_ids" in batch else stream_ids(batch)
        losses = module.item_losses if has_items(module) else outputs["loss"][None]
        step.losses.append(AsyncHostCopy(losses.isfinite()))
        if not ends:
            return
        self._done.append(step)
        self._running = None
        self.check_steps(trainer, module, keep_last=1)
        if trainer.precision == "16-mixed":
            module.log("train/skipped_steps", float(self.skipped))

    def check_steps(self, trainer: pl.Trainer, module: pl.LightningModule, *, keep_last: int = 0) -> None:
        """Checks all steps but the last `keep_last`. Raises UserError at the first that is not finite."""
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        while len(self._done) > keep_last:
            step = self._done.pop(0)
            finite = [flag for losses in step.losses for flag in losses.read()]
            fine = step.gradient is None or all(step.gradient.read())
            if not all(finite):
                culprits = step.items
                if len(finite) == len(step.items):  # losses are per item
                    culprits = [item for item, good in zip(step.items, finite, strict=True) if not good]
                raise _error("loss", step, culprits, module)
            self._in_a_row = 0 if fine else self._in_a_row + 1
            if not fine and (not scaled or self._in_a_row > MOST_SKIPS):
                raise _error("gradient", step, step.items, module)
            if not fine:
                self.skipped += 1
                log.warning("Step %d: the gradient overflows in half precision; skipped", step.number)

    def _now(self, number: int) -> Step:
        self._running = self._running or Step(number, [], [])
        return self._running


def _error(what: str, step: Step, items: list[tuple[int, str]], module: pl.LightningModule) -> NonFiniteError:
    """The error for a step, with its items and their timesteps, if they have any."""
    names = [f"{stream} item {number}" for number, stream in items]
    if has_items(module):
        timesteps = torch.empty(len(items), dtype=torch.int64)
        module.process.sample_times(ItemRNG(module.seed, items), timesteps)
        names = [f"{name} at timestep {t}" for name, t in zip(names, timesteps.tolist(), strict=True)]
    return NonFiniteError(
        f"The {what} of step {step.number} is not finite",
        where=", ".join(names),
        remedy="No later checkpoint was written. Lower the learning rate, or train in bf16-mixed or float32.",
    )
