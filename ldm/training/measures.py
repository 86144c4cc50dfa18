"""Figures while a run learns: how well the subject is drawn by now, and whether the class still is."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl

from ldm.errors import UserError
from ldm.training.device import placed
from ldm.training.score import Score


@dataclass(frozen=True)
class Measuring:
    """When a run is measured on its way.

    every_steps: optimizer steps between two measures, a multiple of the steps between validations; 0: none.
    params: of the `evaluation`, where they differ from its own: few pictures in few steps cost little.
    early_stop: measures without a better score after which training ends; 0: it never does.
    """

    every_steps: int = 0
    params: Mapping[str, Any] = field(default_factory=dict)
    early_stop: int = 0


class Measures(pl.Callback):
    """Measures the weights that would be kept, the averaged ones where there are any, after validation.

    `rows` are the figures so far, {"step", "score", ...}; they are part of a checkpoint. The score is
    the evaluation's.
    """

    def __init__(self, score: Score, measuring: Measuring):
        self.score, self.measuring = score, measuring
        self.rows: list[dict[str, float]] = []
        self.seconds = 0.0  # spent measuring in this process

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        trainer.should_stop |= self._over()

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        step = trainer.global_step
        if step % self.measuring.every_steps:
            return
        figures, since = None, time.perf_counter()
        if trainer.is_global_zero:
            with placed(self.score.draw.first_stage, module.device):
                figures = self.score.after()
            score = round(self.score.evaluation.score(figures), 4)
            figures = {name: value for name, value in figures.items() if isinstance(value, float)}
            figures["score"] = score
        figures = trainer.strategy.broadcast(figures)
        self.seconds += time.perf_counter() - since
        self.rows.append({"step": step, **figures})
        module.log_dict({f"measure/{name}": value for name, value in figures.items()}, sync_dist=True)
        trainer.should_stop |= self._over()

    def latest(self, step: int) -> float | None:
        """The score at this step, if it was measured."""
        return self.rows[-1]["score"] if self.rows and self.rows[-1]["step"] == step else None

    def _over(self) -> bool:
        return 0 < self.measuring.early_stop <= len(self.rows) - 1 - best_of(self.rows)


def best_of(rows: Sequence[Mapping[str, float]]) -> int:
    """Number of the first row with the best score; -1 without rows."""
    scores = [row["score"] for row in rows]
    return scores.index(max(scores)) if scores else -1


def check_measuring(plain: Mapping[str, Any]) -> None:
    """Refuses measures that would never be taken."""
    measuring = Measuring(**plain.get("measures", {}))
    if measuring.every_steps == 0:
        return
    if not plain.get("evaluation"):
        remedy = "Add one, or set measures.every_steps=0."
        raise UserError("There is no `evaluation` to measure by", where="measures", remedy=remedy)
    trainer = plain["trainer"]
    batches = trainer.get("val_check_interval")
    steps = batches // trainer.get("accumulate_grad_batches", 1) if isinstance(batches, int) else 0
    if steps < 1 or measuring.every_steps % steps:
        what = f"A measure after every {measuring.every_steps} steps never follows a validation"
        remedy = "Choose a multiple of trainer.val_check_interval, which counts micro-batches."
        raise UserError(what, where="measures.every_steps", remedy=remedy)
