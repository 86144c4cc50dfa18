"""Callbacks of a run: previews, offloading of the autoencoder, throughput and gradient norm."""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch.optim import Optimizer

from ldm.contact_sheet import contact_sheet, save_image
from ldm.data.buckets import Shape
from ldm.engine.averaging import evaluated_weights
from ldm.engine.device import peak_memory_mib, temporarily_on
from ldm.engine.gradients import gradient_norm
from ldm.engine.step_log import is_logged
from ldm.files import make_folder
from ldm.pipeline import Text2Image
from ldm.runs.sampling import generate_samples
from ldm.schema import SamplesConfig

log = logging.getLogger(__name__)


class Previews(pl.Callback):
    """Saves a grid of samples every `config.every_steps` optimizer steps, with the same prompts and seeds."""

    def __init__(
        self,
        pipeline: Text2Image,
        config: SamplesConfig,
        prompts: Sequence[str],
        folder: Path,
        *,
        shapes: Sequence[Shape] = (),
    ):
        self.pipeline = pipeline
        self.shapes = shapes
        self.prompts = prompts
        self.folder = folder
        self.config = replace(config, n=min(config.n, config.preview_n))

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: object, batch: dict, batch_idx: int
    ) -> None:
        step, done = trainer.global_step, (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not done or step % self.config.every_steps or not trainer.is_global_zero:
            return
        with evaluated_weights(trainer), temporarily_on(self.pipeline.vae, module.device):
            rows = generate_samples(self.pipeline, self.config, self.prompts, shapes=self.shapes)
            grid = contact_sheet(rows)
        save_image(make_folder(self.folder) / f"step-{step:06d}.png", grid, {"prompts": list(self.prompts)})
        if isinstance(trainer.logger, pl.loggers.TensorBoardLogger):
            writer = trainer.logger.experiment
            writer.add_image("previews", np.asarray(grid), step, dataformats="HWC")


class OffloadVAE(pl.Callback):
    """Moves the autoencoder to the CPU, for training that uses only cached latents."""

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        module.networks["vae"].cpu()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class LogFirstStepTime(pl.Callback):
    """Logs how long the first step took, which includes compilation if the UNet is compiled."""

    def __init__(self, *, compiled: bool):
        self.compiled = compiled

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.said = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: dict, batch_idx: int
    ) -> None:
        self.since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: object, batch: dict, batch_idx: int
    ) -> None:
        if not self.said:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            also = ", compilation included," if self.compiled else ""
            log.info("The first step%s took %.1f s", also, time.perf_counter() - self.since)
            self.said = True


class ThroughputLogger(pl.Callback):
    """Logs images/s, peak memory (MiB) and the gradient norm before clipping, at steps that are written."""

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.since, self.images = time.perf_counter(), 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: object, batch: dict, batch_idx: int
    ) -> None:
        self.images += len(batch["item"]) * trainer.world_size

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if not is_logged(module):
            return
        now, norm = time.perf_counter(), gradient_norm(trainer, optimizer)
        if norm is not None:
            module.log("train/grad_norm", norm)
        module.log_dict(
            {
                "train/images_per_second": self.images / (now - self.since),
                "train/peak_memory_mib": peak_memory_mib(),
            }
        )
        self.since, self.images = now, 0
