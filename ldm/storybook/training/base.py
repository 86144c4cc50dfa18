"""Training of the storybook's base: the UNet of a small Stable Diffusion, on a stream of captioned images."""

from collections.abc import Callable

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.models.autoencoder import DiagonalGaussian
from ldm.randomness import ItemRNG
from ldm.schema import TrainerOptions
from ldm.training.cuda_graph import graphed_loss
from ldm.training.latent_diffusion import LatentDiffusion

PREPARED = ("latent_stats", "ids", "posterior", "noise", "timestep")  # of a batch: what its loss is made of


class StorybookBase(LatentDiffusion):
    """`LatentDiffusion` with a frozen text encoder; token ids and random numbers come from worker processes.

    The loss is the same. A GPU takes thousands of such small items a second, more than one process
    can tokenize and draw random numbers for. Its data is a `StorybookStream`.
    """

    def check(self, trainer: TrainerOptions | pl.Trainer, *, processes: int = 1) -> None:
        """Refuses options that this shorter step does not support."""
        super().check(trainer, processes=processes)
        left_out = {
            "trainable.text_encoder": self.trainable.text_learns(self.networks),
            "trainable.learned_token": self.trainable.learned_token is not None,
            "objective.prior_target": self.objective.streams["prior"].target == "teacher",
            "objective.subject_loss": self.objective.subject_loss is not None,
            "objective.masks": self.objective.masks is not None,
        }
        for key in (key for key, present in left_out.items() if present):
            what = f"The storybook's base is trained without {key}"
            raise UserError(what, where=f"model.params.{key}", remedy="Take it off.")

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.trainer.datamodule.set_prepare(self.prepare)

    def prepare(self, batch: dict) -> dict:
        """Adds "ids" [B, M] and the items' random numbers to a batch, on the CPU; removes the captions."""
        factor, channels = self.first_stage_model.factor, self.first_stage_model.embed_dim
        items = batch["item"].tolist()
        shape = (len(items), channels, batch["image"].shape[-2] // factor, batch["image"].shape[-1] // factor)
        posterior, noise = torch.empty(shape), torch.empty(shape)
        timestep = torch.empty(len(items), dtype=torch.int64)
        rng = ItemRNG(self.seed, [(item, "subject") for item in items])
        rng.randn("posterior", posterior)
        self.process.sample_noise(rng, noise)
        self.process.sample_times(rng, timestep)
        rest = {key: value for key, value in batch.items() if key != "caption"} | self.objective.select(batch)
        ids = self.cond_stage_model.tokenize(batch["caption"])
        return rest | {"ids": ids, "posterior": posterior, "noise": noise, "timestep": timestep}

    def on_before_batch_transfer(self, batch: dict, dataloader_idx: int) -> dict:
        """The random numbers are in the batch already."""
        return batch

    def build_graphed_step(self) -> Callable[[dict], Tensor]:
        graphed = graphed_loss(self, self.losses_of)
        return lambda batch: graphed(**{name: batch[name] for name in PREPARED})

    def loss_per_item(self, batch: dict) -> Tensor:
        """Weighted denoising loss of each item -> [B] float32 (Ho et al. 2020, eq. 14)."""
        if self.graphed_step is not None and torch.is_grad_enabled():
            return self.graphed_step(batch)
        return self.losses_of(**{name: batch[name] for name in PREPARED})

    def losses_of(
        self, *, latent_stats: Tensor, ids: Tensor, posterior: Tensor, noise: Tensor, timestep: Tensor
    ) -> Tensor:
        """`loss_per_item` of what a batch holds."""
        x0 = DiagonalGaussian.from_latent_stats(latent_stats.float()).sample(posterior)
        noisy = self.process.add_noise(x0, noise, timestep)
        told = self.conditioner.conditioning(self.cond_stage_model.encode(ids), None)
        prediction = self.apply_model(noisy, timestep, told)
        target = self.process.target(x0, noise, timestep)
        return self.objective.per_item(self.process, prediction, target, timestep)
