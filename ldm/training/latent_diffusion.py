"""DreamBooth's training step: `LatentDiffusion` holds the networks under the names of released files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.checkpoints.embedding import EMBEDDING, save_embedding
from ldm.checkpoints.lora import merge_lora, save_lora
from ldm.checkpoints.save import save_model
from ldm.config import instantiate
from ldm.diffusion.loss import DreamBoothLoss, dreambooth_loss, min_snr_weights, mse_per_item
from ldm.diffusion.schedule import add_noise, make_alphas_cumprod, training_target
from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderKL, DiagonalGaussian
from ldm.models.lora import LoRA
from ldm.models.text_encoder import CLIPTextEncoder
from ldm.models.unet import UNetModel
from ldm.training.compiling import CompileMode, TrainingGraph
from ldm.training.conditioning import Conditioner
from ldm.training.draws import StepDraws, drawn, latent_shape
from ldm.training.gradients import clip
from ldm.training.optimizers import LRSchedule, OptimizerName, adamw, check_optimizer, with_schedule
from ldm.training.sharding import Sharded, shard
from ldm.training.techniques import NewWord, Pull, Teacher

PriorTarget = Literal["noise", "teacher"]


class LatentDiffusion(pl.LightningModule):
    """UNet, text encoder and frozen autoencoder with the DreamBooth loss (Ruiz et al. 2023, eq. 2).

    Its state dict has the names of a Stable Diffusion file: `model.diffusion_model.*`, `first_stage_model.*`,
    `cond_stage_model.*`. A batch is a dict: "moments" [B, 2C, h, w] or "image" [B, 3, H, W] in [-1, 1],
    "caption" list of str, "is_prior" [B] bool, "item" [B] int64 (subject and prior items numbered apart).

    Args:
        unet_config, first_stage_config, cond_stage_config: nodes of the three networks.
        parameterization: what the UNet predicts: "eps" (SD 1.x), "v" (SD 2.x at 768 pixels) or "x0".
        linear_start, linear_end, timesteps, beta_schedule: of the noise schedule.
        zero_terminal_snr: ends the schedule in noise alone (Lin et al. 2024), so that brightness is learnt
            too; not with "eps".
        prior_loss_weight: lambda of eq. 2; 0 trains without prior preservation.
        min_snr_gamma: weights the loss of every item by min-SNR-gamma; None leaves all timesteps equal.
        min_snr_floor: added to these weights, in terms of x0 (see `min_snr_weights`).
        offset_noise: standard deviation of what is added to all of an item's noise in a channel, so that
            brightness is learnt too (Guttenberg 2023); 0.1 is usual.
        l2_pull: weight of the squared distance of the weights to the base's, which can stand in for prior
            images (`num_priors` 0); logged as `train/l2_distance`.
        prior_target: of the prior items: "noise", as of the subject's, or "teacher": the base's prediction.
        train_unet, train_text_encoder: which networks learn.
        text_encoder_steps: optimizer steps after which the text encoder stays as it is; None: it learns on.
        new_word: node of a `NewWord`: vectors for the identifier, learned with the networks or, where both
            are switched off, alone. They are kept in `embedding.safetensors`.
        learning_rate: of AdamW; `text_encoder_learning_rate` None is the same.
        optimizer: "adamw", "adamw_8bit" (bitsandbytes), or "adamw_bf16", which keeps UNet and text encoder in
            bfloat16 and rounds their updates stochastically.
        step_in_backward: each weight learns as soon as its gradient is there, which is then freed.
        lr_schedule: after `warmup_steps` optimizer steps constant, a cosine to 0, or "wsd" (`lr_factor`).
        lora: node of a `LoRA`: what learns are factors beside the layers of UNet and text encoder.
        compile: mode in which torch.compile translates the UNet's training graph, at the first step.
        seed: of the run; all draws follow from it and the item's number.
    """

    def __init__(
        self,
        *,
        unet_config: dict,
        first_stage_config: dict,
        cond_stage_config: dict,
        parameterization: str = "eps",
        linear_start: float = 0.00085,
        linear_end: float = 0.012,
        timesteps: int = 1000,
        zero_terminal_snr: bool = False,
        beta_schedule: str = "scaled_linear",
        prior_loss_weight: float = 1.0,
        min_snr_gamma: float | None = None,
        min_snr_floor: float = 0.0,
        offset_noise: float = 0.0,
        l2_pull: float = 0.0,
        prior_target: PriorTarget = "noise",
        train_unet: bool = True,
        train_text_encoder: bool = True,
        text_encoder_steps: int | None = None,
        new_word: dict | None = None,
        learning_rate: float = 1e-6,
        text_encoder_learning_rate: float | None = None,
        weight_decay: float = 0.01,
        betas: Sequence[float] = (0.9, 0.999),
        lr_schedule: LRSchedule = "constant",
        warmup_steps: int = 0,
        optimizer: OptimizerName = "adamw",
        step_in_backward: bool = False,
        lora: dict | None = None,
        compile: CompileMode | None = None,
        seed: int = 23,
    ):
        super().__init__()
        unet: UNetModel = instantiate(unet_config)
        self.model = nn.ModuleDict({"diffusion_model": unet})
        self.first_stage_model: AutoencoderKL = instantiate(first_stage_config)
        self.cond_stage_model: CLIPTextEncoder = instantiate(cond_stage_config)
        alphas_cumprod = make_alphas_cumprod(
            beta_schedule=beta_schedule,
            linear_start=linear_start,
            linear_end=linear_end,
            timesteps=timesteps,
            zero_terminal_snr=zero_terminal_snr,
        )
        self.register_buffer("alphas_cumprod", alphas_cumprod, persistent=False)
        if zero_terminal_snr and parameterization == "eps":
            remedy = "Set model.params.parameterization=v for a base that predicts v, or take it off."
            raise UserError("Noise alone says nothing of eps", where="zero_terminal_snr", remedy=remedy)
        self.parameterization, self.seed, self.prior_loss_weight = parameterization, seed, prior_loss_weight
        self.min_snr_gamma, self.min_snr_floor = min_snr_gamma, min_snr_floor
        self.offset_noise, self.l2_pull, self.prior_target = offset_noise, l2_pull, prior_target
        self.text_encoder_steps = text_encoder_steps
        self.new_word: NewWord | None = instantiate(new_word) if new_word else None
        text_rate = learning_rate if text_encoder_learning_rate is None else text_encoder_learning_rate
        self.learning_rates = {"unet": learning_rate, "text_encoder": text_rate}
        self.weight_decay, self.betas, self.lr_schedule = weight_decay, tuple(betas), lr_schedule
        self.first_stage_model.requires_grad_(False)
        unet.requires_grad_(train_unet)
        self.cond_stage_model.requires_grad_(train_text_encoder)
        self.lora: LoRA | None = instantiate(lora) if lora else None
        if self.lora is not None:
            self.lora.attach({"unet": unet, "cond_stage": self.cond_stage_model})
        self.optimizer, self.step_in_backward, self.warmup_steps = optimizer, step_in_backward, warmup_steps
        if optimizer == "adamw_bf16":
            unet.to(torch.bfloat16)
            self.cond_stage_model.to(torch.bfloat16)
        self._graph = None if compile is None else TrainingGraph(unet, mode=compile)
        self._pull: Pull | None = None
        self._teacher: Teacher | None = None
        self._conditioner = Conditioner(self.cond_stage_model)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The three networks by the names of `ldm.checkpoints.layout`."""
        return {
            "unet": self.model["diffusion_model"],
            "first_stage": self.first_stage_model,
            "cond_stage": self.cond_stage_model,
        }

    @property
    def learners(self) -> dict[str, nn.Module]:
        """What the optimizer changes for each network: the network itself, or the factors beside it."""
        parts = self.networks if self.lora is None else self.lora.parts
        text = self.cond_stage_model.transformer if self.lora is None else parts["cond_stage"]
        words = {} if self.new_word is None else {"new_word": self.cond_stage_model.new_words}
        return {"unet": parts["unet"], "text_encoder": text, **words}

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """images: [B, 3, H, W] in [-1, 1] -> moments [B, 2C, h, w] of their latents."""
        return self.first_stage_model.encode(images.to(self.device)).moments.contiguous()

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[Tensor, list[int]]:
        """B prompts -> the contexts [P, M, D] of the different ones, and which of them each has: [B].

        Equal prompts go through the text encoder once: in a call, or, where it is frozen, in the whole run.
        """
        over = self.text_encoder_steps is not None and self.global_step >= self.text_encoder_steps
        with torch.set_grad_enabled(torch.is_grad_enabled() and not over):
            return self._conditioner(prompts, frozen=not self._text_learns)

    @property
    def _text_learns(self) -> bool:
        parts = (part for name, part in self.learners.items() if name != "unet")
        return any(p.requires_grad for part in parts for p in part.parameters())

    def setup(self, stage: str) -> None:
        """Keeps the base as it is, before a checkpoint replaces its weights."""
        if self.new_word is not None and not self.cond_stage_model.new_words:
            raise ValueError("call add_new_word between loading the base and training")
        if self.l2_pull and stage == "fit":
            self._pull = Pull(self.parameters())
        if self.prior_target == "teacher" and stage == "fit":
            how = {"lora": self.lora, "precision": getattr(self._trainer, "precision", "32-true")}
            self._teacher = Teacher(self.model["diffusion_model"], self.cond_stage_model, **how)

    def configure_model(self) -> None:
        """Splits the networks over the processes, where the Trainer asks for that."""
        if isinstance(self.trainer.strategy, Sharded):
            shard(self.networks, self.device_mesh["data_parallel"])

    def add_new_word(self) -> None:
        """Lets prompts hold the new word, if there is one. To be called when the base's weights are there."""
        tower, new = self.cond_stage_model, self.new_word
        if new is not None:
            tower.add_word(new.word, tower.vectors_of(new.init))
            self._conditioner.forget()

    def on_train_start(self) -> None:
        """Contexts of other weights, and ids on another device, are forgotten."""
        self._conditioner.forget()
        for kept in (self._pull, self._teacher):
            if kept is not None:
                kept.to(self.device)

    def on_before_batch_transfer(self, batch: dict, dataloader_idx: int) -> dict:
        """Adds what is read or drawn on the CPU while the items are there (see `drawn`)."""
        stage = self.first_stage_model
        shape = latent_shape(batch, channels=stage.embed_dim, factor=stage.factor)
        timesteps, offset = len(self.alphas_cumprod), bool(self.offset_noise)
        return batch | drawn(batch, self.seed, shape, timesteps=timesteps, offset=offset)

    def apply_model(self, x: Tensor, t: Tensor, context: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """x: [B, C, h, w], t: [B], context: [P, M, D], rows: [B] -> the UNet's prediction [B, C, h, w]."""
        compiled = self._graph is not None and torch.is_grad_enabled()
        return (self._graph if compiled else self.networks["unet"]).predict(x, t, context, rows)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        loss = self._log_loss(batch, "train").total
        if self._pull is not None:
            distance = self._pull.distance()
            self.log("train/l2_distance", distance)
            loss = loss + self.l2_pull * distance
        return loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """The same loss at draws that never change, because the items do not."""
        self._log_loss(batch, "val")

    def _log_loss(self, batch: dict, stage: str) -> DreamBoothLoss:
        per_item = self.loss_per_item(batch)
        self.item_losses = per_item.detach()
        loss = dreambooth_loss(per_item, batch["is_prior"], self.prior_loss_weight)
        self.log_dict(
            {
                f"{stage}/loss": loss.total,
                f"{stage}/subject_loss": loss.subject,
                f"{stage}/prior_loss": loss.prior,
            },
            prog_bar=True,
            batch_size=len(per_item),
            sync_dist=True,  # the mean over processes
        )
        return loss

    def loss_per_item(self, batch: dict) -> Tensor:
        """Weighted denoising loss of each item -> [B] float32 (Ho et al. 2020, eq. 14)."""
        if "draws" not in batch:
            batch = self.on_before_batch_transfer(batch, 0)
        moments = batch["moments"] if "moments" in batch else self.encode_images(batch["image"])
        posterior = DiagonalGaussian.from_moments(moments.float())
        draws = batch["draws"].to(self.device, non_blocking=True)
        timesteps, posterior_noise, noise, offset = StepDraws.views(draws, posterior.mean.shape)
        x0 = posterior.sample(posterior_noise)
        if self.offset_noise:
            noise = noise + self.offset_noise * offset
        noisy = add_noise(x0, noise, timesteps, self.alphas_cumprod)
        prediction = self.apply_model(noisy, timesteps, *self.encode_prompts(batch["caption"]))
        target = training_target(self.parameterization, x0, noise, timesteps, self.alphas_cumprod)
        prompts = [c for c, (_, part) in zip(batch["caption"], batch["keys"], strict=True) if part == "prior"]
        if self._teacher is not None and prompts:
            rows = batch["prior_rows"].to(self.device, non_blocking=True)
            kept = self._teacher.predict(noisy[rows], timesteps[rows], prompts)
            target = target.index_copy(0, rows, kept.to(target))
        return mse_per_item(prediction, target) * self.loss_weights(timesteps)

    def loss_weights(self, timesteps: Tensor) -> Tensor:
        """Weight of each item's loss by its own timestep -> [B]."""
        if self.min_snr_gamma is None:
            return torch.ones_like(timesteps, dtype=torch.float32)
        return min_snr_weights(
            timesteps,
            self.alphas_cumprod,
            gamma=self.min_snr_gamma,
            floor=self.min_snr_floor,
            parameterization=self.parameterization,
        )

    def check(self, trainer: Mapping[str, Any]) -> None:
        """Refuses a Trainer, given by its arguments, with which this optimizer cannot work."""
        check_optimizer(
            name=self.optimizer,
            step_in_backward=self.step_in_backward,
            compiled=self._graph is not None,
            accumulate=trainer.get("accumulate_grad_batches", 1),
            clip=trainer.get("gradient_clip_val"),
            precision=trainer.get("precision"),
            processes=trainer.get("world_size", 1),
        )
        if self.text_encoder_steps is not None and trainer.get("world_size", 1) > 1:
            remedy = "Train with one device, or take model.params.text_encoder_steps off."
            what = "Several processes need gradients of the text encoder at every step"
            raise UserError(what, remedy=remedy)

    def configure_optimizers(self) -> dict:
        settings = ("accumulate_grad_batches", "gradient_clip_val", "precision", "world_size")
        self.check({name: getattr(self.trainer, name) for name in settings})
        rates = self.learning_rates | ({"new_word": self.new_word.learning_rate} if self.new_word else {})
        optimizer = adamw(
            {name: (module, rates[name]) for name, module in self.learners.items()},
            name=self.optimizer,
            step_in_backward=self.step_in_backward,
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

        Where a LoRA learns it is merged in that file, and in `lora.safetensors` beside it alone; a new word
        is in `embedding.safetensors` alone.
        """
        parts = {name: network.state_dict() for name, network in self.networks.items()}
        for word, vectors in self.cond_stage_model.new_words.items():
            del parts["cond_stage"][f"new_words.{word}"]
            save_embedding(path.with_name(EMBEDDING), word, vectors, metadata=metadata)
        if self.lora is not None:
            layers = self.lora.factors()
            save_lora(path.with_name("lora.safetensors"), layers, parts, dtype=dtype, metadata=metadata)
            parts = merge_lora(parts, layers)
        alphas_cumprod = self.alphas_cumprod.cpu()
        return save_model(path, parts, alphas_cumprod=alphas_cumprod, dtype=dtype, metadata=metadata)
