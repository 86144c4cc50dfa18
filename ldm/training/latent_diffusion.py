"""DreamBooth's training step: `LatentDiffusion` holds the networks under the names of released files."""

from collections.abc import Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.annotations import (
    Builds,
    Decay,
    Node,
    NonNegativeFloat,
    NonNegativeInt,
    Seed,
    Timesteps,
    Variance,
)
from ldm.checkpoints.embedding import embeddings_beside, save_embedding
from ldm.checkpoints.layout import LEARNED_TOKENS
from ldm.checkpoints.lora import lora_beside, merge_lora, save_lora
from ldm.checkpoints.save import save_model
from ldm.conditioner import Conditioner
from ldm.config import instantiate
from ldm.diffusion.process import DiscreteDiffusion, NoiseProcess
from ldm.diffusion.schedule import make_alphas_cumprod
from ldm.models.autoencoder import AutoencoderKL, DiagonalGaussian
from ldm.models.conditioning import Conditioning
from ldm.models.lora import LoRA
from ldm.models.text_encoder import CLIPTextEncoder
from ldm.precision import vae_precision
from ldm.training.compiling import CompileMode, TrainingGraph
from ldm.training.gradients import clip
from ldm.training.objective import Loss, Objective
from ldm.training.optimizers import LRSchedule, OptimizerName, adamw, check_optimizer, with_schedule
from ldm.training.schema import TrainerOptions
from ldm.training.sharding import Sharded, shard
from ldm.training.step_log import StepMean, begins_step, is_logged
from ldm.training.step_randomness import StepRandomness, latent_shape, sample_randomness
from ldm.training.techniques import L2SP, LearnedToken, Reference
from ldm.training.text_rates import freeze_unrated, rates_of_encoders, with_each_encoder


class LatentDiffusion(pl.LightningModule):
    """UNet, text encoder and frozen autoencoder with the DreamBooth loss (Ruiz et al. 2023, eq. 2).

    Its state dict has the names of a Stable Diffusion file: `model.diffusion_model.*`, `first_stage_model.*`,
    `cond_stage_model.*`. A batch is a dict: "latent_stats" [B, 2C, h, w] or "image" [B, 3, H, W] in [-1, 1],
    "caption" list of str, "is_prior" [B] bool, "item" [B] int64 (subject and prior items numbered apart).

    Args:
        unet, vae, text_encoder: nodes of the three networks.
        parameterization: what the UNet predicts: "eps" (SD 1.x), "v" (SD 2.x at 768 pixels) or "x0".
        linear_start, linear_end, timesteps, beta_schedule: of the noise schedule.
        zero_terminal_snr: ends the schedule in noise alone (Lin et al. 2024), so that brightness is learnt
            too; not with "eps".
        objective: what predictions are compared with, and how errors become one loss.
        offset_noise: standard deviation of what is added to all of an item's noise in a channel, so that
            brightness is learnt too (Guttenberg 2023); 0.1 is usual.
        train_unet, train_text_encoder: which networks learn.
        text_encoder_steps: optimizer steps after which the text encoder stays as it is; None: it learns on.
        learned_token: node of a `LearnedToken`: textual inversion, with the networks or, where both are
            switched off, alone. Its vectors are kept in `embeddings/WORD.safetensors`.
        learning_rate, weight_decay, betas: of AdamW (Loshchilov & Hutter 2019).
        text_encoder_learning_rate: None is the same; of SDXL's two also {clip_l: 5e-6, clip_g: 0}, where one
            of rate 0 stays as it is.
        warmup_steps: optimizer steps in which the rates rise linearly from 0.
        optimizer: "adamw", "adamw_8bit" (bitsandbytes), or "adamw_bf16", which keeps UNet and text encoder in
            bfloat16 and rounds their updates stochastically.
        fused_backward: each weight learns as soon as its gradient is there, which is then freed.
        lr_schedule: after `warmup_steps` optimizer steps constant, a cosine to 0, or "wsd" (`lr_factor`).
        lora: node of a `LoRA`: what learns are factors beside the layers of UNet and text encoder.
        compile: mode in which torch.compile translates the UNet's training graph, at the first step.
        seed: of the run; all draws follow from it and the item's number.
    """

    MOVED: ClassVar[Mapping[str, str]] = {
        "prior_loss_weight": "objective.prior_loss_weight",
        "prior_target": "objective.prior_target",
        "l2_sp_weight": "objective.l2_sp_weight",
        "l2_pull": "objective.l2_sp_weight",
        "min_snr_gamma": "objective.weighting={target: ldm.training.objective.MinSNR, params: {gamma: 5}}",
        "min_snr_floor": "objective.weighting={target: ldm.training.objective.MinSNR, params: {floor: 1}}",
    }

    def __init__(
        self,
        *,
        unet: Node,
        vae: Node,
        text_encoder: Node,
        parameterization: Literal["eps", "v", "x0"] = "eps",
        linear_start: Variance = 0.00085,
        linear_end: Variance = 0.012,
        timesteps: Timesteps = 1000,
        zero_terminal_snr: bool = False,
        beta_schedule: Literal["scaled_linear", "linear"] = "scaled_linear",
        objective: Objective | None = None,
        offset_noise: NonNegativeFloat = 0.0,
        train_unet: bool = True,
        train_text_encoder: bool = True,
        text_encoder_steps: NonNegativeInt | None = None,
        learned_token: Annotated[Node, Builds(LearnedToken)] | None = None,
        learning_rate: NonNegativeFloat = 1e-6,
        text_encoder_learning_rate: NonNegativeFloat | Mapping[str, NonNegativeFloat] | None = None,
        weight_decay: NonNegativeFloat = 0.01,
        betas: tuple[Decay, Decay] = (0.9, 0.999),
        lr_schedule: LRSchedule = "constant",
        warmup_steps: NonNegativeInt = 0,
        optimizer: OptimizerName = "adamw",
        fused_backward: bool = False,
        lora: Annotated[Node, Builds(LoRA)] | None = None,
        compile: CompileMode | None = None,
        seed: Seed = 23,
    ):
        super().__init__()
        self.model = nn.ModuleDict({"diffusion_model": instantiate(unet)})
        self.first_stage_model: AutoencoderKL = instantiate(vae)
        self.cond_stage_model: CLIPTextEncoder = instantiate(text_encoder)
        networks = self.networks
        alphas_cumprod = make_alphas_cumprod(
            beta_schedule=beta_schedule,
            linear_start=linear_start,
            linear_end=linear_end,
            timesteps=timesteps,
            zero_terminal_snr=zero_terminal_snr,
            dtype=torch.float64,
        )
        self.process: NoiseProcess = DiscreteDiffusion(
            alphas_cumprod, parameterization=parameterization, offset_noise=offset_noise
        )
        self.seed = seed
        self.objective = objective or Objective()
        self.text_encoder_steps = text_encoder_steps
        self.learned_token: LearnedToken | None = instantiate(learned_token) if learned_token else None
        text_rate = learning_rate if text_encoder_learning_rate is None else text_encoder_learning_rate
        self.text_encoder_rates = rates_of_encoders(self.cond_stage_model, text_rate)
        self.learning_rates = {"unet": learning_rate, "text_encoder": max(self.text_encoder_rates.values())}
        self.weight_decay, self.betas, self.lr_schedule = weight_decay, tuple(betas), lr_schedule
        networks["vae"].requires_grad_(False)
        networks["unet"].requires_grad_(train_unet)
        networks["text_encoder"].requires_grad_(train_text_encoder)
        freeze_unrated(self.cond_stage_model, self.text_encoder_rates)
        self.lora: LoRA | None = instantiate(lora) if lora else None
        if self.lora is not None:
            self.lora.attach({name: networks[name] for name in ("unet", "text_encoder")})
        self.optimizer = optimizer
        self.fused_backward = fused_backward
        self.warmup_steps = warmup_steps
        if optimizer == "adamw_bf16":
            networks["unet"].to(torch.bfloat16)
            networks["text_encoder"].to(torch.bfloat16)
        self._graph = None if compile is None else TrainingGraph(networks["unet"], mode=compile)
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
        modules = self.networks if self.lora is None else self.lora.layers
        text = self.cond_stage_model.weights if self.lora is None else modules["text_encoder"]
        tokens = {} if self.learned_token is None else {"learned_token": self.cond_stage_model.learned_tokens}
        return {"unet": modules["unet"], "text_encoder": text, **tokens}

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """images: [B, 3, H, W] in [-1, 1] -> latent stats [B, 2C, h, w] of their latents."""
        with vae_precision(self.networks["unet"], self.device):
            return self.first_stage_model.encode(images.to(self.device)).latent_stats.contiguous()

    def condition(self, prompts: Sequence[str], sizes: Tensor | None = None) -> Conditioning:
        """The conditioning of B items by their prompts; sizes: [B, 6], as in `Conditioner.conditioning`.

        Equal prompts go through the text encoder once: in a call, or, where it is frozen, in the whole run.
        """
        over = self.text_encoder_steps is not None and self.global_step >= self.text_encoder_steps
        with torch.set_grad_enabled(torch.is_grad_enabled() and not over):
            return self.conditioner(prompts, sizes, frozen=not self._text_learns)

    @property
    def _text_learns(self) -> bool:
        modules = (module for name, module in self.trainable_modules.items() if name != "unet")
        return any(p.requires_grad for module in modules for p in module.parameters())

    def setup(self, stage: str) -> None:
        """Keeps the base as it is, before a checkpoint replaces its weights."""
        if self.learned_token is not None and not self.cond_stage_model.learned_tokens:
            raise ValueError("call add_learned_token between loading the base and training")
        if self.objective.l2_sp_weight and stage == "fit":
            self._l2_sp = L2SP(self.parameters())
        if self.objective.prior_target == "teacher" and stage == "fit":
            how = {"lora": self.lora, "precision": getattr(self._trainer, "precision", "32-true")}
            self._reference = Reference(self.model["diffusion_model"], self.cond_stage_model, **how)

    def configure_model(self) -> None:
        """Splits the networks over the processes, where the Trainer asks for that."""
        if isinstance(self.trainer.strategy, Sharded):
            shard(self.networks, self.device_mesh["data_parallel"])

    def add_learned_token(self) -> None:
        """Lets prompts hold the new word, if there is one. To be called when the base's weights are there."""
        text_encoder, new = self.cond_stage_model, self.learned_token
        if new is not None:
            text_encoder.add_token(new.word, text_encoder.token_embedding_of(new.init))
            self.conditioner.forget()

    def on_train_start(self) -> None:
        """Contexts of other weights, and ids on another device, are forgotten."""
        self.conditioner.forget()
        for kept in (self._l2_sp, self._reference):
            if kept is not None:
                kept.to(self.device)

    def on_before_batch_transfer(self, batch: dict, dataloader_idx: int) -> dict:
        """Adds what is read or drawn on the CPU while the items are there (see `sample_randomness`)."""
        stage = self.first_stage_model
        shape = latent_shape(batch, channels=stage.embed_dim, factor=stage.factor)
        return batch | sample_randomness(batch, self.seed, shape, self.process)

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
        per_item = self.loss_per_item(batch)
        self.item_losses = per_item.detach()
        is_prior = batch["is_prior"]
        loss = self.objective.combine(per_item, {"subject": ~is_prior, "prior": is_prior})
        if stage == "val" or is_logged(self):
            values = loss.logs(stage)
            if stage == "train":
                values = self._step_mean(values, begins=begins_step(self, batch_idx))
            self.log_dict(values, prog_bar=True, batch_size=len(per_item), sync_dist=True)  # over processes
        return loss

    def loss_per_item(self, batch: dict) -> Tensor:
        """Weighted denoising loss of each item -> [B] float32 (Ho et al. 2020, eq. 14)."""
        if "randomness" not in batch:
            batch = self.on_before_batch_transfer(batch, 0)
        latent_stats = (
            batch["latent_stats"] if "latent_stats" in batch else self.encode_images(batch["image"])
        )
        posterior = DiagonalGaussian.from_latent_stats(latent_stats.float())
        randomness = batch["randomness"].to(self.device, non_blocking=True)
        timesteps, posterior_noise, noise = StepRandomness.views(randomness, posterior.mean.shape)
        x0 = posterior.sample(posterior_noise)
        noisy = self.process.add_noise(x0, noise, timesteps)
        prediction = self.apply_model(noisy, timesteps, self.condition(batch["caption"], batch.get("sizes")))
        target = self.process.target(x0, noise, timesteps)
        prompts = list(compress(batch["caption"], (stream == "prior" for _, stream in batch["stream_ids"])))
        if self._reference is not None and prompts:
            rows = batch["prior_rows"].to(self.device, non_blocking=True)
            sizes = batch["sizes"][rows] if "sizes" in batch else None
            kept = self._reference.predict(noisy[rows], timesteps[rows], prompts, sizes)
            target = target.index_copy(0, rows, kept.to(target))
        return self.objective.per_item(self.process, prediction, target, timesteps)

    def check(self, trainer: TrainerOptions | pl.Trainer, *, processes: int = 1) -> None:
        """Refuses a Trainer, or its options, with which this module cannot learn."""
        check_optimizer(
            name=self.optimizer,
            fused_backward=self.fused_backward,
            compiled=self._graph is not None,
            accumulate=trainer.accumulate_grad_batches,
            clip=trainer.gradient_clip_val,
            precision=trainer.precision,
            processes=processes,
        )

    def configure_optimizers(self) -> dict:
        self.check(self.trainer, processes=self.trainer.world_size)
        rates = self.learning_rates | (
            {"learned_token": self.learned_token.learning_rate} if self.learned_token else {}
        )
        groups = {name: (module, rates[name]) for name, module in self.trainable_modules.items()}
        optimizer = adamw(
            with_each_encoder(groups, self.text_encoder_rates),
            name=self.optimizer,
            fused_backward=self.fused_backward,
            seed=self.seed,
            betas=self.betas,
            weight_decay=self.weight_decay,
            fused=self.trainer.precision != "16-mixed",  # there the scaler must see the gradients first
        )
        return with_schedule(
            optimizer, self.lr_schedule, warmup_steps=self.warmup_steps, max_steps=self.trainer.max_steps
        )

    configure_gradient_clipping = clip

    def train(self, mode: bool = True) -> "LatentDiffusion":
        """Frozen networks stay in eval mode."""
        super().train(mode)
        for network in self.networks.values():
            network.train(mode and any(p.requires_grad for p in network.parameters()))
        return self

    def export(self, path: Path, *, dtype: torch.dtype, metadata: dict[str, str]) -> Path:
        """Writes one Stable Diffusion file of all three networks and the schedule.

        Where a LoRA learns it is merged in that file, and alone in `loras/RUN.safetensors` beside it; a new
        word is alone in `embeddings/WORD.safetensors`.
        """
        state_dicts = {name: network.state_dict() for name, network in self.networks.items()}
        text = state_dicts["text_encoder"]
        state_dicts["text_encoder"] = {k: x for k, x in text.items() if LEARNED_TOKENS not in k}
        for word, vectors in self.cond_stage_model.learned_tokens.items():
            save_embedding(embeddings_beside(path), word, vectors, metadata=metadata)
        if self.lora is not None:
            layers = self.lora.weights()
            save_lora(lora_beside(path), layers, state_dicts, dtype=dtype, metadata=metadata)
            state_dicts = merge_lora(state_dicts, layers)
        alphas_cumprod = self.process.alphas_cumprod.cpu()
        return save_model(path, state_dicts, alphas_cumprod=alphas_cumprod, dtype=dtype, metadata=metadata)
