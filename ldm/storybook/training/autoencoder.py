"""Training of the storybook's autoencoder."""

from collections.abc import Mapping
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm import randomness
from ldm.annotations import Node, NonNegativeFloat, NonNegativeInt, Seed
from ldm.checkpoints.layout import split
from ldm.checkpoints.load import load_state_dicts, read_checkpoint
from ldm.checkpoints.save import save_model
from ldm.config import instantiate
from ldm.engine.gradients import clip
from ldm.models.autoencoder import AutoencoderKL
from ldm.optim.optimizers import build_optimizer, with_schedule
from ldm.optim.schedules import Cosine


class AutoencoderTask(pl.LightningModule):
    """Trains `vae` to reconstruct images: L1 + squared error + a small KL term to N(0, 1).

    The images are flat and inked, so these losses suffice, without adversarial or perceptual ones.

    Args:
        vae: the `AutoencoderKL` node.
        learning_rate: of AdamW, after `warmup_steps` and along a cosine to 0.
        kl_weight: of the KL divergence per pixel value.
        square_weight: of the squared error, which is what PSNR measures, beside L1.
        net2wider: file of an autoencoder with a fraction of the width (Net2Net): training starts from its
            function, and its encoder is frozen, so that models of its latents stay valid.
    """

    def __init__(
        self,
        *,
        vae: Node,
        learning_rate: NonNegativeFloat = 1e-3,
        warmup_steps: NonNegativeInt = 100,
        kl_weight: NonNegativeFloat = 1e-3,
        square_weight: NonNegativeFloat = 10.0,
        net2wider: str | None = None,
        seed: Seed = 23,
    ):
        super().__init__()
        self.vae: AutoencoderKL = instantiate(vae)
        for module in (self.vae.encoder, self.vae.quant_conv):
            module.requires_grad_(net2wider is None)
        self.net2wider = net2wider
        self.learning_rate, self.warmup_steps, self.seed = learning_rate, warmup_steps, seed
        self.kl_weight, self.square_weight = kl_weight, square_weight

    @property
    def networks(self) -> dict[str, AutoencoderKL]:
        """By the name of `ldm.checkpoints.layout`."""
        return {"vae": self.vae}

    def setup(self, stage: str) -> None:
        """Loads the widened autoencoder, before a checkpoint replaces it."""
        if self.net2wider is not None:
            narrow = split(read_checkpoint(self.net2wider)[0])["vae"]
            state_dicts = {"vae": net2wider_state(narrow, self.vae)}
            load_state_dicts(self.networks, state_dicts, where=self.net2wider)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        image = batch["image"].to(memory_format=torch.channels_last)
        posterior = self.vae.encode(image)
        noise = randomness.randn(
            posterior.mean.shape[1:], seed=self.seed, items=batch["item"].tolist(), purpose="posterior"
        ).to(image)
        error = self.vae.decode(posterior.sample(noise)) - image
        kl = posterior.kl().sum() / image.numel()
        loss = error.abs().mean() + self.square_weight * error.square().mean() + self.kl_weight * kl
        self.log_dict({"train/loss": loss, "train/kl": kl}, prog_bar=True)
        return loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        posterior = self.vae.encode(batch["image"])
        reconstruction = self.vae.decode(posterior.mean).clamp(-1, 1)
        mse = F.mse_loss(reconstruction, batch["image"])
        self.log_dict({"val/mse": mse, "val/latent_square": posterior.mean.square().mean()}, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        mse = self.trainer.callback_metrics["val/mse"]
        self.log("val/psnr", -10 * torch.log10(mse / 4), prog_bar=True)  # the peak is 2, from -1 to 1

    configure_gradient_clipping = clip

    def configure_optimizers(self) -> dict:
        groups = {"vae": (self.vae, self.learning_rate)}
        fused = self.trainer.precision != "16-mixed"  # there the scaler must see the gradients first
        optimizer = build_optimizer(groups, fused=fused)
        schedule = Cosine(warmup_steps=self.warmup_steps)
        return with_schedule(optimizer, schedule, max_steps=self.trainer.max_steps)

    def export(self, path: Path, *, dtype: torch.dtype, metadata: dict[str, str]) -> Path:
        """Writes the autoencoder alone, under SD's names."""
        state_dicts = {"vae": self.vae.state_dict()}
        return save_model(path, state_dicts, alphas_cumprod=None, dtype=dtype, metadata=metadata)


def net2wider_state(narrow: Mapping[str, Tensor], model: AutoencoderKL) -> dict[str, Tensor]:
    """The state of `model`, with k times the channels, that computes what `narrow` does (Chen et al. 2016).

    Each channel is repeated k times, within its group of the norms, and layers that read it take the mean of
    the copies; in the decoder one with random weights, which sum to 1, so that training can tell them apart.
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
