"""Online evaluation: metrics of the subject and of its class during training."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl

from ldm.config import param_of, takes
from ldm.engine.device import temporarily_on
from ldm.errors import UserError
from ldm.runs.before_after import BeforeAfterEvaluation
from ldm.schema import OnlineEvalConfig, RunConfig

Watch = Callable[[Mapping[str, float]], None]  # is shown each row; what it raises ends the training


class OnlineEvalCallback(pl.Callback):
    """Evaluates the weights that would be exported (the average, if there is one) after validation.

    `rows` are the metrics so far, {"step", "score", ...}; they are part of a checkpoint. The score is
    the evaluation's.
    """

    def __init__(
        self, before_after: BeforeAfterEvaluation, config: OnlineEvalConfig, watch: Watch | None = None
    ):
        self.before_after = before_after
        self.config = config
        self.watch = watch
        self.rows: list[dict[str, float]] = []
        self.seconds = 0.0  # spent on evaluation in this process

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        trainer.should_stop |= self._over()

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        step = trainer.global_step
        if step % self.config.every_steps:
            return
        metrics, since = None, time.perf_counter()
        if trainer.is_global_zero:
            with temporarily_on(self.before_after.pipeline.vae, module.device):
                metrics = self.before_after.after()
            score = round(self.before_after.evaluation.score(metrics), 4)
            metrics = {name: value for name, value in metrics.items() if isinstance(value, float)}
            metrics["score"] = score
        metrics = trainer.strategy.broadcast(metrics)
        self.seconds += time.perf_counter() - since
        self.rows.append({"step": step, **metrics})
        module.log_dict({f"measure/{name}": value for name, value in metrics.items()}, sync_dist=True)
        trainer.should_stop |= self._over()
        if self.watch is not None:
            self.watch(self.rows[-1])

    def latest(self, step: int) -> float | None:
        """The score at this step, if it was evaluated."""
        return self.rows[-1]["score"] if self.rows and self.rows[-1]["step"] == step else None

    def _over(self) -> bool:
        return 0 < self.config.early_stop <= len(self.rows) - 1 - best_of(self.rows)


def best_of(rows: Sequence[Mapping[str, float]]) -> int:
    """Index of the first row with the best score; -1 without rows."""
    scores = [row["score"] for row in rows]
    return scores.index(max(scores)) if scores else -1


def check_online_eval(config: RunConfig) -> None:
    """Raises UserError for evaluations that never happen, where something is chosen or ended by them too."""
    every = config.online_eval.every_steps
    if config.export.weights == "best" and not 0 < every <= config.trainer.max_steps:
        remedy = "Set online_eval.every_steps, at most trainer.max_steps, or export.weights=last."
        what = "Which weights are the best is told by online evaluation, and there is none"
        raise UserError(what, where="export.weights", remedy=remedy)
    if every == 0:
        return
    if not config.evaluation:
        remedy = "Add one, or set online_eval.every_steps=0."
        raise UserError("Online evaluation needs an `evaluation`", where="online_eval", remedy=remedy)
    if takes(config.data, "validation_batches") and not param_of(config.data, "validation_batches"):
        what = "Online evaluation follows the validation, and there is none"
        remedy = "Set data.params.validation_batches=1 or more, or online_eval.every_steps=0."
        raise UserError(what, where="data.params.validation_batches", remedy=remedy)
    if config.online_eval.early_stop and every > config.trainer.max_steps:
        what = f"The first evaluation is after {every} steps, and the training has {config.trainer.max_steps}"
        remedy = "Set online_eval.every_steps, at most trainer.max_steps, or online_eval.early_stop=0."
        raise UserError(what, where="online_eval.early_stop", remedy=remedy)
    trainer = config.trainer
    interval, accumulate = trainer.val_check_interval or 0, trainer.accumulate_grad_batches
    if interval < accumulate or every * accumulate % interval:
        what = f"An evaluation every {every} steps never follows a validation"
        remedy = "Choose a multiple of trainer.val_check_interval, which counts micro-batches."
        raise UserError(what, where="online_eval.every_steps", remedy=remedy)
