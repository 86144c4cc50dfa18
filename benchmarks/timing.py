"""Seconds of steps, on a CPU or a GPU, of a loop of our own or inside Lightning's."""

import time
from collections.abc import Callable, Iterator

import pytorch_lightning as pl
import torch

Answer = Callable[[float], object]  # hears of the seconds of each window


def synchronize(device: str) -> None:
    """Waits for all work of a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(work: Callable[[], object], times: int, device: str) -> float:
    """Seconds of so many calls, until the device is done with them."""
    start = time.perf_counter()
    for _ in range(times):
        work()
    synchronize(device)
    return time.perf_counter() - start


def serve(step: Callable[[], object], counts: Iterator[int], answer: Answer, *, device: str) -> None:
    """Takes as many steps as each number says and answers their seconds."""
    for count in counts:
        answer(timed(step, count, device))


class _Windows(pl.Callback):
    """To be the last callback: the first number is asked for before the first step."""

    def __init__(self, counts: Iterator[int], answer: Answer, device: str):
        self.counts = counts
        self.answer = answer
        self.device = device

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._begin(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: object, batch: dict, batch_idx: int
    ) -> None:
        self.left -= 1
        if self.left == 0:
            synchronize(self.device)
            self.answer(time.perf_counter() - self.since)
            self._begin(trainer)

    def _begin(self, trainer: pl.Trainer) -> None:
        self.left = next(self.counts, 0)
        trainer.should_stop = self.left == 0
        synchronize(self.device)
        self.since = time.perf_counter()


def timed_by_callback(counts: Iterator[int], answer: Answer, *, device: str) -> pl.Callback:
    """`serve` for the steps of a Trainer, which stops when there are no more numbers."""
    return _Windows(counts, answer, device)
