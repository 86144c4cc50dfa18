"""Checkpointing: when checkpoints are written, atomic writing, and which ones are kept."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import CheckpointIO
from pytorch_lightning.callbacks import Checkpoint
from torch import Tensor

from ldm.checkpoints.tensors import unpickle
from ldm.engine.non_finite import NonFiniteGuard
from ldm.engine.resume import by_step, name_of, step_of
from ldm.engine.signals import Stopped, StopSignals
from ldm.errors import UserError
from ldm.files import HashingWriter, atomic_write, make_folder, require_space

MONITORED = "val/loss"  # without online evaluation, the checkpoint with its minimum is the best


class Scored(Protocol):
    """What measures a training: an online evaluation."""

    def latest(self, step: int) -> float | None:
        """The score at an optimizer step, the higher the better; None: it was not measured there."""
        ...


class AtomicCheckpointIO(CheckpointIO):
    """Checkpoint IO for Lightning: atomic, with a SHA-256 file, and without unpickling of code."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        path = Path(path)
        make_folder(path.parent)
        require_space(path.parent, _bytes_of(checkpoint) + 2**20, what="a checkpoint")
        try:
            with atomic_write(path) as temporary:
                with temporary.open("wb") as file:
                    hashed = HashingWriter(file)
                    torch.save(checkpoint, hashed)
                # First, so that there is no checkpoint without it
                with atomic_write(checksum_path(path)) as note:
                    note.write_text(f"{hashed.sha256}  {path.name}\n", encoding="utf-8")
        except (OSError, RuntimeError, pickle.PicklingError) as error:
            raise UserError(f"The checkpoint cannot be written: {error}", where=path) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return unpickle(Path(path), mapped=False)

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)
        checksum_path(Path(path)).unlink(missing_ok=True)


class CheckpointCallback(Checkpoint):
    """Saves every `every` optimizer steps, at the best score of the online evaluation, and at the end.

    It keeps the last `keep` checkpoints, and the best one: by the score, or else by the validation loss.

    Checkpoints are written between two steps, after all logs of the first one are on disk. There a signal is
    handled too: after a checkpoint, `Stopped` is raised.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every: int,
        keep: int,
        stop: StopSignals,
        guard: NonFiniteGuard,
        online_eval: Scored | None = None,
    ):
        self.folder, self.every, self.keep = folder, every, keep
        self.stop = stop
        self.guard = guard
        self.online_eval = online_eval
        self.saved = -1  # the step last saved
        self.best: dict[str, float] = {}  # "loss" and "step" of the best checkpoint
        self._loss: dict[str, float] = {}  # the same of the last validation

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.saved = trainer.global_step
        self.stop.listen()  # over the handlers of Lightning, which end a run without saving it

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: dict, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches:
            return
        asked = self._asked_to_stop(trainer, module)
        scored_best = self.online_eval is not None and self._is_best(trainer.global_step)
        if asked or trainer.global_step % self.every == 0 or scored_best:
            self.save(trainer, module)
        if asked:
            raise Stopped(asked)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """The end of training, as the epoch is endless; after it the EMA weights replace the others."""
        self.save(trainer, module)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        score = self.online_eval.latest(trainer.global_step) if self.online_eval else None
        if score is not None:
            self._loss = {"loss": -score, "step": trainer.global_step}
        elif self.online_eval is None and MONITORED in trainer.callback_metrics:
            loss = float(trainer.callback_metrics[MONITORED])
            self._loss = {"loss": loss, "step": trainer.global_step}

    def _is_best(self, step: int) -> bool:
        return self._loss.get("step") == step and self._loss["loss"] < self.best.get("loss", float("inf"))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Sets the progress of the loops back to the last completed batch."""
        loops = checkpoint["loops"]["fit_loop"]
        for count in ("total", "current"):
            batches, epochs = loops["epoch_loop.batch_progress"][count], loops["epoch_progress"][count]
            batches["ready"] = batches["completed"]
            epochs["processed"] = epochs["completed"]

    def on_load_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Counts the micro-batches of the steps done as these are split now, which is where the data begin.

        Otherwise a run that goes on with another accumulation would begin within a step.
        """
        done = checkpoint["global_step"] * trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for count in ("total", "current"):  # the same, as the epoch is endless
            progress[count] = dict.fromkeys(("ready", "started", "processed", "completed"), done)

    def save(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Writes a checkpoint of this step, unless there is one or it is not finite; removes old ones."""
        step = trainer.global_step
        if step == self.saved:
            return
        self.guard.check_steps(trainer, module)
        if self._is_best(step):
            self.best = self._loss
        for logger in trainer.loggers:
            logger.save()
        trainer.save_checkpoint(self.folder / name_of(step), weights_only=False)
        self.saved = step
        if trainer.is_global_zero:
            for path in by_step(self.folder)[self.keep :]:
                if step_of(path) != self.best.get("step"):
                    AtomicCheckpointIO().remove_checkpoint(path)

    def _asked_to_stop(self, trainer: pl.Trainer, module: pl.LightningModule) -> int:
        """The signal that any of the processes received, or 0."""
        received = self.stop.received or 0
        if trainer.world_size == 1:
            return received
        return int(trainer.strategy.reduce(torch.tensor(received, device=module.device), reduce_op="max"))


def checksum_path(path: Path) -> Path:
    """The checksum file of a checkpoint, for `sha256sum --check`."""
    return path.with_name(f"{path.name}.sha256")


def _bytes_of(checkpoint: Any) -> int:
    """Of all tensors in it; what several of them share is written once."""
    storages = (tensor.untyped_storage() for tensor in _tensors(checkpoint))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tensors(node: Any) -> Iterator[Tensor]:
    if isinstance(node, Tensor):
        yield node
    elif isinstance(node, dict | list | tuple):
        for inner in node.values() if isinstance(node, dict) else node:
            yield from _tensors(inner)
