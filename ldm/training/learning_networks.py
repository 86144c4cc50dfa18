"""A Stable Diffusion's three networks as a Lightning module: what of them learns, and by which optimizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.annotations import Node
from ldm.checkpoints.save import save_model
from ldm.conditioner import Conditioner
from ldm.config import instantiate
from ldm.diffusion.process import NoiseProcess
from ldm.engine.gradients import clip
from ldm.engine.sharding import Sharded, shard
from ldm.models.adapter import Adapter
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.conditioning import Conditioning
from ldm.models.lora import LoRA
from ldm.models.text_encoder import CLIPTextEncoder
from ldm.optim.optimizer_nodes import OptimizerNode, weights_dtype
from ldm.optim.optimizers import build_optimizer, check_optimizer, with_schedule
from ldm.optim.schedules import LRSchedule
from ldm.precision import vae_precision
from ldm.schema import TrainerOptions
from ldm.training.compiling import CompileMode, TrainingGraph
from ldm.training.trainable import Trainable


class LearningNetworks(pl.LightningModule):
    """UNet, text encoder and frozen autoencoder, without a loss.

    The state dict has the names of a Stable Diffusion file: `model.diffusion_model.*`, `first_stage_model.*`,
    `cond_stage_model.*`. Arguments are those of `LatentDiffusion`, built.
    """

    def __init__(
        self,
        *,
        unet: Node,
        vae: Node,
        text_encoder: Node,
        process: NoiseProcess,
        trainable: Trainable,
        optimizer: OptimizerNode,
        lr_schedule: LRSchedule,
        compile: CompileMode | None,
        seed: int,
    ):
        super().__init__()
        self.model = nn.ModuleDict({"diffusion_model": instantiate(unet)})
        self.first_stage_model: AutoencoderKL = instantiate(vae)
        self.cond_stage_model: CLIPTextEncoder = instantiate(text_encoder)
        networks = self.networks
        self.process = process
        self.seed = seed
        self.trainable = trainable
        self.trainable.attach(networks, timesteps=len(process.alphas_cumprod))
        self.lora: LoRA | Adapter | None = trainable.lora  # a module, whose weights checkpoints keep
        self.optimizer = optimizer
        self.lr_schedule = lr_schedule
        if (dtype := weights_dtype(optimizer)) is not None:
            networks["unet"].to(dtype)
            networks["text_encoder"].to(dtype)
        self.training_graph = None if compile is None else TrainingGraph(networks["unet"], mode=compile)
        self.conditioner = Conditioner(self.cond_stage_model)

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

    def apply_model(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """x: [B, C, h, w], t: [B], conditioning of B items -> the UNet's prediction [B, C, h, w]."""
        compiled = self.training_graph is not None and torch.is_grad_enabled()
        return (self.training_graph if compiled else self.networks["unet"]).predict(x, t, conditioning)

    def configure_model(self) -> None:
        """Splits the networks over the processes, where the Trainer asks for that."""
        if isinstance(self.trainer.strategy, Sharded):
            shard(self.networks, self.device_mesh["data_parallel"])

    def add_learned_token(self) -> None:
        """Lets prompts hold the new word, if there is one. To be called when the base's weights are there."""
        self.trainable.add_token(self.networks)
        self.conditioner.forget()

    def check(self, trainer: TrainerOptions | pl.Trainer, *, processes: int = 1) -> None:
        """Refuses a Trainer, or its options, with which this module cannot learn."""
        how = {"compiled": self.training_graph is not None, "processes": processes}
        check_optimizer(self.optimizer, trainer, rates=self.trainable.rates(self.networks), **how)

    def configure_optimizers(self) -> dict:
        self.check(self.trainer, processes=self.trainer.world_size)
        groups = self.trainable.param_groups(self.networks)
        fused = self.trainer.precision != "16-mixed"  # there the scaler must see the gradients first
        optimizer = build_optimizer(groups, self.optimizer, fused=fused, seed=self.seed)
        return with_schedule(optimizer, self.lr_schedule, max_steps=self.trainer.max_steps)

    configure_gradient_clipping = clip

    def train(self, mode: bool = True) -> Self:
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
