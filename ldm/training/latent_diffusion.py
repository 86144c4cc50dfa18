"""DreamBooth's training step, on the networks of `ldm/training/learning_networks.py`."""

from collections.abc import Callable

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.annotations import Node, Seed
from ldm.diffusion.process import ProcessConfig
from ldm.engine.step_log import StepMean, begins_step, is_logged
from ldm.models.autoencoder import DiagonalGaussian
from ldm.models.conditioning import Conditioning
from ldm.models.lora_layer import SideLayer
from ldm.optim.optimizer_nodes import OptimizerNode
from ldm.optim.schedules import ScheduleNode, build_schedule
from ldm.schema import TrainerOptions
from ldm.training.compiling import CompileMode
from ldm.training.cuda_graph import GraphedStep, check_cuda_graph, uses_cuda_graph
from ldm.training.learning_networks import LearningNetworks
from ldm.training.moved_keys import MOVED
from ldm.training.objective import BasePrediction, Loss, Objective
from ldm.training.step_randomness import StepRandomness, latent_shape, sample_randomness
from ldm.training.techniques import L2SP, Reference
from ldm.training.trainable import Trainable


class LatentDiffusion(LearningNetworks):
    """UNet, text encoder and frozen autoencoder with the DreamBooth loss (Ruiz et al. 2023, eq. 2).

    Its state dict has the names of a Stable Diffusion file: `model.diffusion_model.*`, `first_stage_model.*`,
    `cond_stage_model.*`. A batch is a dict: "latent_stats" [B, 2C, h, w] or "image" [B, 3, H, W] in [-1, 1],
    "caption" list of str, "stream" list of "subject" and "prior", "item" [B] int64 (numbered in each stream),
    and for a masked loss "mask" [B, 1, h, w].

    Args:
        unet, vae, text_encoder: nodes of the three networks.
        process: how noise is added, and what the UNet predicts.
        objective: what predictions are compared with, and how errors become one loss.
        trainable: which parameters learn, and at which rates.
        optimizer: a name, or a node of any optimizer, as of torch.optim. "adamw_bf16" keeps UNet and text
            encoder in bfloat16 and rounds their updates stochastically, "adamw_bf16_moments" only what it
            remembers of the gradients; "prodigy" finds the rate, of which
            `learning_rate` is a factor, 1; "schedule_free" averages the weights, in place of `ema_decay` and
            of a schedule (docs/optimizers.md). `FusedBackward` has one step each weight as soon as its
            gradient is there, which is then freed.
        lr_schedule: a name, or a node of one, with a warm-up (`Constant`); all but "constant" end at 0.
        compile: mode in which torch.compile translates the UNet's training graph, at the first step, and at
            the first of each bucket.
        cuda_graph: a step's forward and backward pass are launched as CUDA graphs (`GraphedStep`). None: on a
            GPU, where one process trains photos of one bucket (graphs of each keep their own memory), without
            a fused backward pass, an OFT, or a compile mode that has CUDA graphs itself.
        seed: of the run; all draws follow from it and the item's number.
    """

    MOVED = MOVED

    def __init__(
        self,
        *,
        unet: Node,
        vae: Node,
        text_encoder: Node,
        process: ProcessConfig | None = None,
        objective: Objective | None = None,
        trainable: Trainable | None = None,
        optimizer: OptimizerNode = "adamw",
        lr_schedule: ScheduleNode = "constant",
        compile: CompileMode | None = None,
        cuda_graph: bool | None = None,
        seed: Seed = 23,
    ):
        process = process or ProcessConfig()
        super().__init__(
            unet=unet,
            vae=vae,
            text_encoder=text_encoder,
            process=process.build(),
            trainable=trainable or Trainable(),
            optimizer=optimizer,
            lr_schedule=build_schedule(lr_schedule),
            compile=compile,
            seed=seed,
        )
        self.objective = objective or Objective()
        self.cuda_graph = cuda_graph
        self.graphed_step: Callable[[dict], Tensor] | None = None
        self._l2_sp: L2SP | None = None
        self._reference: Reference | None = None
        self._step_mean = StepMean()

    def setup(self, stage: str) -> None:
        """Keeps the base as it is, before a checkpoint replaces its weights."""
        if self.trainable.learned_token is not None and not self.cond_stage_model.learned_tokens:
            raise ValueError("call add_learned_token between loading the base and training")
        if self.objective.l2_sp_weight and stage == "fit":
            beside = [layer for layer in self.modules() if isinstance(layer, SideLayer)]
            self._l2_sp = L2SP(self.parameters(), beside=beside)
        if self.objective.needs_reference and stage == "fit":
            how = {"lora": self.lora, "precision": getattr(self._trainer, "precision", "32-true")}
            self._reference = Reference(self.model["diffusion_model"], self.cond_stage_model, **how)

    def check(self, trainer: TrainerOptions | pl.Trainer, *, processes: int = 1) -> None:
        super().check(trainer, processes=processes)
        check_cuda_graph(self, trainer, processes=processes)

    def on_train_start(self) -> None:
        """Contexts of other weights, and ids on another device, are forgotten."""
        self.conditioner.forget()
        for kept in (self._l2_sp, self._reference):
            if kept is not None:
                kept.to(self.device)
        if uses_cuda_graph(self, self._trainer):
            self.graphed_step = self.build_graphed_step()

    def on_train_end(self) -> None:
        self.graphed_step = None  # and the memory that it keeps

    def build_graphed_step(self) -> Callable[[dict], Tensor]:
        """The losses of a batch by CUDA graphs."""
        return GraphedStep(self, self._reference)

    def on_before_batch_transfer(self, batch: dict, dataloader_idx: int) -> dict:
        """Adds what is read or drawn on the CPU while the items are there.

        See `sample_randomness` and `Objective.select`.
        """
        stage = self.first_stage_model
        shape = latent_shape(batch, channels=stage.embed_dim, factor=stage.factor)
        drawn = sample_randomness(batch, self.seed, shape, self.process)
        return batch | drawn | self.objective.select(batch)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        loss = self._log_loss(batch, "train", batch_idx).total
        if self._l2_sp is not None:
            distance = self._l2_sp.distance()
            self.log("train/l2_distance", distance)
            loss = loss + self.objective.l2_sp_weight * distance
        return loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """The same loss at draws that never change, because the items do not."""
        self._log_loss(batch, "val", batch_idx)

    def _log_loss(self, batch: dict, stage: str, batch_idx: int) -> Loss:
        batch = self._prepared(batch)
        per_item = self.loss_per_item(batch)
        self.item_losses = per_item.detach()
        loss = self.objective.combine(per_item, batch["stream_masks"])
        if stage == "val" or is_logged(self):
            values = loss.logs(stage)
            if stage == "train":
                values = self._step_mean(values, begins=begins_step(self, batch_idx))
            self.log_dict(values, prog_bar=True, batch_size=len(per_item), sync_dist=True)  # over processes
        return loss

    def loss_per_item(self, batch: dict) -> Tensor:
        """Weighted denoising loss of each item -> [B] float32 (Ho et al. 2020, eq. 14)."""
        batch = self._prepared(batch)
        if self.graphed_step is not None and torch.is_grad_enabled():
            return self.graphed_step(batch)
        return self.losses(batch, self.condition(batch["caption"], batch.get("sizes")))

    def losses(self, batch: dict, conditioning: Conditioning) -> Tensor:
        """`loss_per_item`, given the conditioning."""
        x0, t, noise = self.sample_latents(batch)
        x_t = self.process.add_noise(x0, noise, t)
        prediction = self.apply_model(x_t, t, conditioning)
        target = self.process.target(x0, noise, t)
        weights = batch.get("pixel_weights")
        weights = None if weights is None else weights.to(self.device, non_blocking=True)
        base = self.predict_base(batch, x_t, t)
        return self.objective.losses(self.process, prediction, target, t, base, weights)

    def sample_latents(self, batch: dict) -> tuple[Tensor, Tensor, Tensor]:
        """Latents of the items, timesteps and noise: [B, C, h, w], [B] int64, [B, C, h, w]."""
        stats = batch["latent_stats"] if "latent_stats" in batch else self.encode_images(batch["image"])
        posterior = DiagonalGaussian.from_latent_stats(stats.float())
        randomness = batch["randomness"].to(self.device, non_blocking=True)
        t, posterior_noise, noise = StepRandomness.views(randomness, posterior.mean.shape)
        return posterior.sample(posterior_noise), t, noise

    def predict_base(self, batch: dict, x_t: Tensor, t: Tensor) -> BasePrediction | None:
        """The base's prediction for the items that learn it, in part or whole, or are compared with it."""
        if self._reference is None or not len(batch["reference_rows"]):
            return None
        rows = batch["reference_rows"].to(self.device, non_blocking=True)
        conditioning = batch.get("reference_conditioning") or self._reference.condition_of(batch)
        values = self._reference.predict(x_t[rows], t[rows], conditioning)
        compared, share = batch.get("compared"), batch.get("noise_share")
        if compared is not None:
            compared = compared.to(self.device, non_blocking=True)
        if share is not None:
            share = share.to(self.device, non_blocking=True)[rows]
        return BasePrediction(rows, values, compared, share)

    def _prepared(self, batch: dict) -> dict:
        """A batch that no Trainer has handed over gets what it lacks."""
        return batch if "stream_masks" in batch else self.on_before_batch_transfer(batch, 0)
