"""Exponential moving average (EMA) of the trainable weights, which is validated, previewed and exported."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.engine.device import is_awaited
from ldm.engine.optimizer_average import OptimizerAverage
from ldm.errors import UserError


class WeightAverage(pl.Callback):
    """Exponential moving average of the trainable weights, in float32 (Tarvainen and Valpola 2017, eq. 2).

    Every n-th optimizer step, average <- d^n average + (1 - d^n) weight; the first update copies. Frozen
    weights and buffers are neither averaged nor moved, and no step waits for the device.

    A checkpoint's `state_dict` holds the averages, its `current_model_state` the weights being trained.
    While the validation runs, and after training, the module holds the averages.

    Args:
        decay: d of each optimizer step, from 0 to 1.
        device: None keeps the average beside the weights. "cpu" spares a GPU the memory: the weights are
            copied to pinned memory on a stream of their own, and a thread updates the average.
        every: n. The updates follow steps 1, 1 + n, 1 + 2 n, ...
    """

    def __init__(self, *, decay: float, device: Literal["cpu"] | None = None, every: int = 1):
        if not 0 <= decay <= 1:
            raise UserError(f"ema_decay is {decay}", where="ema_decay", remedy="Choose from 0 to 1.")
        if every < 1:
            raise UserError(f"ema_every is {every}", where="ema_every", remedy="It must be at least 1.")
        self.decay = decay
        self.every = every
        self.device = None if device is None else torch.device(device)
        self.updates = 0
        self.latest_step = 0  # optimizer steps taken when the average was last updated
        self.averages: dict[str, Tensor] = {}  # parameter name -> float32
        self._parameters: list[nn.Parameter] = []
        self._live: list[Tensor] | None = None  # the trained weights, while the module holds the averages
        self._host_copy: list[Tensor] = []  # pinned, where the average is on another device
        self._copied: torch.cuda.Event | None = None
        self._pending: Future[None] | None = None
        self._worker: ThreadPoolExecutor | None = None

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Starts the average as a copy of the weights, before a checkpoint is loaded."""
        if stage != "fit":
            return
        learning = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._parameters = list(learning.values())
        place = self.device or module.device
        self.averages = {name: _float_copy(p, place) for name, p in learning.items()}

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Moves the average to the device of the weights, or allocates the copy on the host."""
        if self.device is None:
            self.averages = {name: average.to(module.device) for name, average in self.averages.items()}
        elif self._is_apart:
            pinned = self._parameters[0].is_cuda
            self._host_copy = [
                torch.empty_like(p, device=self.device, pin_memory=pinned) for p in self._parameters
            ]
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="weight-average")

    def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, loss: Tensor) -> None:
        """Waits until the weights are copied: an optimizer may step in the backward pass."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: object, batch: dict, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step <= self.latest_step or (step - 1) % self.every:
            return
        self.latest_step = step
        if self._is_apart:
            self._update_apart()
        else:
            self._update([p.detach() for p in self._parameters])

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.averages:
            self._put_in()

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.averages:
            self._take_out()

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Copies the averages into the weights: they are the result of training."""
        self._settle()
        with torch.no_grad():
            for parameter, average in zip(self._parameters, self.averages.values(), strict=True):
                parameter.copy_(average)

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if self._worker is not None:
            self._worker.shutdown()

    def state_dict(self) -> dict[str, Any]:
        self._settle()  # Lightning asks for it before `on_save_checkpoint`
        return {"updates": self.updates, "latest_step": self.latest_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates = state_dict["updates"]
        self.latest_step = state_dict["latest_step"]

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Saves both states; a frozen tensor is the same object in both and written once."""
        self._settle()
        checkpoint["current_model_state"] = checkpoint["state_dict"]
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **self.averages}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Loads the average from `state_dict`; that of a run without an average holds its weights."""
        for name, average in self.averages.items():
            average.copy_(checkpoint["state_dict"][name])
        if "current_model_state" in checkpoint:
            module.load_state_dict(checkpoint["current_model_state"])

    @property
    def _is_apart(self) -> bool:
        """Whether the average lies on another device than the weights."""
        return self.device is not None and any(p.device != self.device for p in self._parameters)

    @torch.no_grad()
    def _update(self, weights: list[Tensor]) -> None:
        averages = list(self.averages.values())
        if self.updates == 0:
            torch._foreach_copy_(averages, weights)
        else:
            weights = [weight.float() for weight in weights]  # no copies where they are float32
            torch._foreach_lerp_(averages, weights, 1 - self.decay**self.every)
        self.updates += 1

    def _update_apart(self) -> None:
        """Asynchronous device-to-host copy of the weights; the average follows in a thread."""
        self._settle()
        weights, copied = [p.detach() for p in self._parameters], None
        side = torch.cuda.Stream() if weights[0].is_cuda else None
        if side is not None:
            side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side) if side is not None else nullcontext():
            torch._foreach_copy_(self._host_copy, weights, non_blocking=is_awaited(weights[0].device))
            if side is not None:
                copied = side.record_event()
        self._copied = copied

        def fold() -> None:
            if copied is not None:
                copied.synchronize()
            self._update(self._host_copy)

        self._pending = self._worker.submit(fold)

    def _settle(self) -> None:
        """Waits for the pending update of the average; an error in the thread is raised here."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _put_in(self) -> None:
        """Puts the averages into the parameters, without a copy where device and dtype are equal."""
        self._settle()
        self._live = [p.data for p in self._parameters]
        with torch.inference_mode(False):
            for parameter, average in zip(self._parameters, self.averages.values(), strict=True):
                parameter.data = average.to(parameter)

    def _take_out(self) -> None:
        for parameter, weight in zip(self._parameters, self._live, strict=True):
            parameter.data = weight
        self._live = None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the module holds the averages; do not train there."""
        self._put_in()
        try:
            yield
        finally:
            self._take_out()


def averaging(
    decay: float | None, *, device: Literal["cpu"] | None, every: int, by_optimizer: bool = False
) -> list[WeightAverage | OptimizerAverage]:
    """The callback of these settings; none without a decay, unless the optimizer averages the weights."""
    if by_optimizer:
        return [OptimizerAverage()]
    return [] if decay is None else [WeightAverage(decay=decay, device=device, every=every)]


def evaluated_weights(trainer: pl.Trainer) -> Any:
    """Context in which the module holds the weights to evaluate: the averages, if there are any."""
    kinds = WeightAverage | OptimizerAverage
    averages = [callback for callback in trainer.callbacks if isinstance(callback, kinds)]
    return averages[0].applied() if averages else nullcontext()


def _float_copy(parameter: nn.Parameter, device: torch.device) -> Tensor:
    return parameter.detach().to(device, torch.float32, copy=True)
