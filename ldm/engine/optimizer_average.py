"""Optimizers that average the weights themselves: what is evaluated and exported is their average."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytorch_lightning as pl
import torch


class OptimizerAverage(pl.Callback):
    """The averages of an optimizer that has `train()` and `eval()`, a schedule-free one.

    It takes gradients at weights y, and keeps an average x of its steps, which is the result of training
    (Defazio et al. 2024, eq. 3 to 5). While the validation runs, and after training, the module holds x.

    As with `WeightAverage`, a checkpoint's `state_dict` holds the averages, its `current_model_state` the
    weights being trained. Looking at the averages changes no bit of these.
    """

    def __init__(self) -> None:
        self.optimizer: Any = None
        self._validation = ExitStack()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """A resumed one is in this mode already: its checkpoint holds y."""
        (self.optimizer,) = trainer.optimizers
        self.optimizer.train()

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.optimizer is not None:
            self._validation.enter_context(self.applied())

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._validation.close()

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.optimizer.eval()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Saves both states; a frozen tensor is the same object in both and written once."""
        with self.applied():
            averages = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
        checkpoint["current_model_state"] = checkpoint["state_dict"]
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **averages}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        module.load_state_dict(checkpoint["current_model_state"])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the module holds the averages; do not train there. Afterwards it holds the same bits."""
        weights = [p.detach() for group in self.optimizer.param_groups for p in group["params"]]
        with torch.inference_mode(False), torch.no_grad():
            trained = [weight.clone() for weight in weights]
            self.optimizer.eval()
        try:
            yield
        finally:
            with torch.inference_mode(False), torch.no_grad():
                self.optimizer.train()
                torch._foreach_copy_(weights, trained)  # the way back of `train` rounds
