"""DreamBooth's training step: `LatentDiffusion` holds the networks under the names of released files."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.annotations import Node, Seed
from ldm.checkpoints.save import save_model
from ldm.conditioner import Conditioner
from ldm.config import instantiate
from ldm.diffusion.process import NoiseProcess, ProcessConfig
from ldm.engine.gradients import clip
from ldm.engine.sharding import Sharded, shard
from ldm.engine.step_log import StepMean, begins_step, is_logged
from ldm.models.adapter import Adapter
from ldm.models.autoencoder import AutoencoderKL, DiagonalGaussian
from ldm.models.conditioning import Conditioning
from ldm.models.lora import LoRA
from ldm.models.lora_layer import SideLayer
from ldm.models.text_encoder import CLIPTextEncoder
from ldm.optim.optimizer_nodes import OptimizerNode, weights_dtype
from ldm.optim.optimizers import build_optimizer, check_optimizer, with_schedule
from ldm.optim.schedules import ScheduleNode, build_schedule
from ldm.precision import vae_precision
from ldm.schema import TrainerOptions
from ldm.training.compiling import CompileMode, TrainingGraph
from ldm.training.cuda_graph import GraphedStep, uses_cuda_graph
from ldm.training.moved_keys import MOVED
from ldm.training.objective import BaseAsked, Loss, Objective
from ldm.training.step_randomness import StepRandomness, latent_shape, sample_randomness
from ldm.training.techniques import L2SP, Reference
from ldm.training.trainable import Trainable


class LatentDiffusion(pl.LightningModule):
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
            encoder in bfloat16 and rounds their updates stochastically; "prodigy" finds the rate, of which
            `learning_rate` is a factor, 1; "schedule_free" averages the weights, in place of `ema_decay` and
            of a schedule (docs/optimizers.md). `FusedBackward` has one step each weight as soon as its
            gradient is there, which is then freed.
        lr_schedule: a name, or a node of one, with a warm-up (`Constant`); all but "constant" end at 0.
        compile: mode in which torch.compile translates the UNet's training graph, at the first step.
        cuda_graph: a step's forward and backward pass are launched as CUDA graphs (`GraphedStep`). None: on a
            GPU, where one process trains without a fused backward pass.
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
        super().__init__()
        self.model = nn.ModuleDict({"diffusion_model": instantiate(unet)})
        self.first_stage_model: AutoencoderKL = instantiate(vae)
        self.cond_stage_model: CLIPTextEncoder = instantiate(text_encoder)
        networks = self.networks
        self.process: NoiseProcess = (process or ProcessConfig()).build()
        self.seed = seed
        self.objective = objective or Objective()
        self.trainable = trainable or Trainable()
        self.trainable.attach(networks, timesteps=len(self.process.alphas_cumprod))
        self.lora: LoRA | Adapter | None = self.trainable.lora  # a module, whose weights checkpoints keep
        self.lr_schedule = build_schedule(lr_schedule)
        self.optimizer = optimizer
        if (dtype := weights_dtype(optimizer)) is not None:
            networks["unet"].to(dtype)
            networks["text_encoder"].to(dtype)
        self._graph = None if compile is None else TrainingGraph(networks["unet"], mode=compile)
        self.cuda_graph = cuda_graph
        self.graphed_step: Callable[[dict], Tensor] | None = None
        self._l2_sp: L2SP | None = None
        self._reference: Reference | None = None
        self.conditioner = Conditioner(self.cond_stage_model)
        self._step_mean = StepMean()

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The three networks by the names of `ldm.checkpoints.layout`."""
        return {
            "unet": self.model["diffusion_model"],
            "vae": self.first_stage_model,
            "text_encoder": self.cond_stage_model,
        }

    @property
    def trainable_modules(self) -> dict[str, nn.Module]:
        """What the optimizer changes for each network: the network itself, or the factors beside it."""
        return self.trainable.modules(self.networks)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """images: [B, 3, H, W] in [-1, 1] -> latent stats [B, 2C, h, w] of their latents."""
        with vae_precision(self.networks["unet"], self.device):
            return self.first_stage_model.encode(images.to(self.device)).latent_stats.contiguous()

    def condition(self, prompts: Sequence[str], sizes: Tensor | None = None) -> Conditioning:
        """The conditioning of B items by their prompts; sizes: [B, 6], as in `Conditioner.conditioning`.

        Equal prompts go through the text encoder once: in a call, or, where it is frozen, in the whole run.
        """
        learns = self.trainable.text_learns_at(self.global_step)
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            frozen = not self.trainable.text_learns(self.networks)
            return self.conditioner(prompts, sizes, frozen=frozen)

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

    def configure_model(self) -> None:
        """Splits the networks over the processes, where the Trainer asks for that."""
        if isinstance(self.trainer.strategy, Sharded):
            shard(self.networks, self.device_mesh["data_parallel"])

    def add_learned_token(self) -> None:
        """Lets prompts hold the new word, if there is one. To be called when the base's weights are there."""
        self.trainable.add_token(self.networks)
        self.conditioner.forget()

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

    def apply_model(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """x: [B, C, h, w], t: [B], conditioning of B items -> the UNet's prediction [B, C, h, w]."""
        compiled = self._graph is not None and torch.is_grad_enabled()
        return (self._graph if compiled else self.networks["unet"]).predict(x, t, conditioning)

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

    def losses(self, batch: dict, told: Conditioning) -> Tensor:
        """`loss_per_item`, given the conditioning."""
        x0, t, noise = self.sample_latents(batch)
        x_t = self.process.add_noise(x0, noise, t)
        prediction = self.apply_model(x_t, t, told)
        target = self.process.target(x0, noise, t)
        weights = batch.get("pixel_weights")
        weights = None if weights is None else weights.to(self.device, non_blocking=True)
        asked = self.ask_base(batch, x_t, t)
        return self.objective.losses(self.process, prediction, target, t, asked, weights)

    def sample_latents(self, batch: dict) -> tuple[Tensor, Tensor, Tensor]:
        """Latents of the items, timesteps and noise: [B, C, h, w], [B] int64, [B, C, h, w]."""
        stats = batch["latent_stats"] if "latent_stats" in batch else self.encode_images(batch["image"])
        posterior = DiagonalGaussian.from_latent_stats(stats.float())
        randomness = batch["randomness"].to(self.device, non_blocking=True)
        t, posterior_noise, noise = StepRandomness.views(randomness, posterior.mean.shape)
        return posterior.sample(posterior_noise), t, noise

    def ask_base(self, batch: dict, x_t: Tensor, t: Tensor) -> BaseAsked | None:
        """The base's prediction for the items that learn it, in part or whole, or are compared with it."""
        if self._reference is None or not len(batch["reference_rows"]):
            return None
        rows = batch["reference_rows"].to(self.device, non_blocking=True)
        told = batch.get("reference_told") or self._reference.condition_of(batch)
        kept = self._reference.predict_told(x_t[rows], t[rows], told)
        compared, share = batch.get("compared"), batch.get("noise_share")
        if compared is not None:
            compared = compared.to(self.device, non_blocking=True)
        if share is not None:
            share = share.to(self.device, non_blocking=True)[rows]
        return BaseAsked(rows, kept, compared, share)

    def _prepared(self, batch: dict) -> dict:
        """A batch that no Trainer has handed over gets what it lacks."""
        return batch if "stream_masks" in batch else self.on_before_batch_transfer(batch, 0)

    def check(self, trainer: TrainerOptions | pl.Trainer, *, processes: int = 1) -> None:
        """Refuses a Trainer, or its options, with which this module cannot learn."""
        how = {"compiled": self._graph is not None, "processes": processes}
        check_optimizer(self.optimizer, trainer, rates=self.trainable.rates(self.networks), **how)

    def configure_optimizers(self) -> dict:
        self.check(self.trainer, processes=self.trainer.world_size)
        groups = self.trainable.param_groups(self.networks)
        fused = self.trainer.precision != "16-mixed"  # there the scaler must see the gradients first
        optimizer = build_optimizer(groups, self.optimizer, fused=fused, seed=self.seed)
        return with_schedule(optimizer, self.lr_schedule, max_steps=self.trainer.max_steps)

    configure_gradient_clipping = clip

    def train(self, mode: bool = True) -> "LatentDiffusion":
        """Frozen networks stay in eval mode."""
        super().train(mode)
        for network in self.networks.values():
            network.train(mode and any(p.requires_grad for p in network.parameters()))
        return self

    def export(self, path: Path, *, dtype: torch.dtype, metadata: dict[str, str]) -> Path:
        """Writes one Stable Diffusion file of all three networks and the schedule.

        A LoRA and a new word are in files of their own beside it too (`Trainable.export`).
        """
        state_dicts = self.trainable.export(path, self.networks, dtype=dtype, metadata=metadata)
        alphas_cumprod = self.process.alphas_cumprod.cpu()
        return save_model(path, state_dicts, alphas_cumprod=alphas_cumprod, dtype=dtype, metadata=metadata)
