"""Training of the storybook's autoencoder."""

from collections.abc import Mapping
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm import randomness
from ldm.checkpoints.layout import split
from ldm.checkpoints.load import load_parts, read_checkpoint
from ldm.checkpoints.save import save_model
from ldm.config import instantiate
from ldm.models.autoencoder import AutoencoderKL
from ldm.training.gradients import clip
from ldm.training.optimizers import adamw, with_schedule


class AutoencoderTask(pl.LightningModule):
    """Trains `first_stage_model` to redraw pictures: L1 + squared error + a light pull to N(0, 1).

    Drawings are flat and inked, so these pixel losses suffice; no adversary, no perceptual network.

    Args:
        first_stage_config: the `AutoencoderKL` node.
        learning_rate: of AdamW, after `warmup_steps` and along a cosine to 0.
        kl_weight: of the KL divergence per pixel value.
        square_weight: of the squared error, which is what PSNR measures, beside L1.
        widen: file of an autoencoder with a fraction of the width: training starts from its function, and its
            encoder stays as it is, so that models of its latents stay valid.
    """

    def __init__(
        self,
        *,
        first_stage_config: dict,
        learning_rate: float = 1e-3,
        warmup_steps: int = 100,
        kl_weight: float = 1e-3,
        square_weight: float = 10.0,
        widen: str | None = None,
        seed: int = 23,
    ):
        super().__init__()
        self.first_stage_model: AutoencoderKL = instantiate(first_stage_config)
        for part in (self.first_stage_model.encoder, self.first_stage_model.quant_conv):
            part.requires_grad_(widen is None)
        self.widen = widen
        self.learning_rate, self.warmup_steps, self.seed = learning_rate, warmup_steps, seed
        self.kl_weight, self.square_weight = kl_weight, square_weight

    @property
    def networks(self) -> dict[str, AutoencoderKL]:
        """By the name of `ldm.checkpoints.layout`."""
        return {"first_stage": self.first_stage_model}

    def setup(self, stage: str) -> None:
        """Takes the narrow autoencoder over, before a checkpoint replaces it."""
        if self.widen is not None:
            narrow = split(read_checkpoint(self.widen)[0])["first_stage"]
            parts = {"first_stage": widened(narrow, self.first_stage_model)}
            load_parts(self.networks, parts, where=self.widen)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        image = batch["image"].to(memory_format=torch.channels_last)
        posterior = self.first_stage_model.encode(image)
        noise = randomness.randn(
            posterior.mean.shape[1:], seed=self.seed, items=batch["item"].tolist(), purpose="posterior"
        ).to(image)
        error = self.first_stage_model.decode(posterior.sample(noise)) - image
        kl = posterior.kl().sum() / image.numel()
        loss = error.abs().mean() + self.square_weight * error.square().mean() + self.kl_weight * kl
        self.log_dict({"train/loss": loss, "train/kl": kl}, prog_bar=True)
        return loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        posterior = self.first_stage_model.encode(batch["image"])
        redrawn = self.first_stage_model.decode(posterior.mean).clamp(-1, 1)
        mse = F.mse_loss(redrawn, batch["image"])
        self.log_dict({"val/mse": mse, "val/latent_square": posterior.mean.square().mean()}, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        mse = self.trainer.callback_metrics["val/mse"]
        self.log("val/psnr", -10 * torch.log10(mse / 4), prog_bar=True)  # the peak is 2, from -1 to 1

    configure_gradient_clipping = clip

    def configure_optimizers(self) -> dict:
        parts = {"first_stage": (self.first_stage_model, self.learning_rate)}
        optimizer = adamw(parts, fused=self.trainer.precision != "16-mixed")  # its scaler comes first
        return with_schedule(
            optimizer, "cosine", warmup_steps=self.warmup_steps, max_steps=self.trainer.max_steps
        )

    def export(self, path: Path, *, dtype: torch.dtype, metadata: dict[str, str]) -> Path:
        """Writes the autoencoder alone, under SD's names."""
        parts = {"first_stage": self.first_stage_model.state_dict()}
        return save_model(path, parts, alphas_cumprod=None, dtype=dtype, metadata=metadata)


def widened(narrow: Mapping[str, Tensor], model: AutoencoderKL) -> dict[str, Tensor]:
    """The state of `model`, with k times the channels, that computes what `narrow` does (Chen et al. 2016).

    Each channel is repeated k times beside itself, within its group of the norms, and what reads it takes the
    mean; in the decoder one with random weights, which sum to 1, so that the copies part in training.
    """
    state = {}
    for name, like in model.state_dict().items():
        tensor = narrow[name]
        copies = [new // old for new, old in zip(like.shape, tensor.shape, strict=True)]
        tensor = tensor.repeat_interleave(copies[0], 0)
        if like.ndim > 1 and copies[1] > 1:
            tensor = tensor.repeat_interleave(copies[1], 1) / copies[1]
            if name.startswith("decoder."):
                apart = tensor.std() * torch.randn_like(tensor).unflatten(1, (-1, copies[1]))
                tensor = tensor + (apart - apart.mean(2, keepdim=True)).flatten(1, 2)
        if ".q." in name:
            tensor = tensor / copies[0] ** 0.5  # attention divides by the root of the width
        state[name] = tensor
    return state
