"""Training of the storybook's judge."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm import randomness
from ldm.annotations import NonNegativeFloat, NonNegativeInt, PositiveInt, Seed
from ldm.checkpoints.save import write_tensors
from ldm.engine.gradients import clip
from ldm.optim.optimizers import build_optimizer, with_schedule
from ldm.optim.schedules import Cosine
from ldm.storybook.judge import Judge
from ldm.storybook.world import ATTRIBUTES


class JudgeTask(pl.LightningModule):
    """Trains the judge on images that are blurred and noisy, like those of an autoencoder.

    Args:
        channels, width: of the `Judge`.
        learning_rate: of AdamW, after `warmup_steps` and along a cosine to 0.
        noise: largest standard deviation of the noise on an image; each item has its own.
        seed: of noise and blur.
    """

    def __init__(
        self,
        *,
        channels: Sequence[PositiveInt] = (32, 64, 96, 128),
        width: PositiveInt = 192,
        learning_rate: NonNegativeFloat = 2e-3,
        warmup_steps: NonNegativeInt = 100,
        noise: NonNegativeFloat = 0.15,
        seed: Seed = 23,
    ):
        super().__init__()
        self.judge = Judge(channels=tuple(channels), width=width)
        self.learning_rate, self.warmup_steps = learning_rate, warmup_steps
        self.noise, self.seed = noise, seed
        self.accuracy: dict[str, float] = {}  # on the validation images, which are not degraded
        self._right: list[Tensor] = []

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        logits = self.judge(self.degrade(batch["image"], batch["item"].tolist()))
        loss = sum(F.cross_entropy(logits[name], batch["labels"][name]) for name in ATTRIBUTES)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def degrade(self, images: Tensor, items: list[int]) -> Tensor:
        """[B, 3, H, W] -> the same shape, each image blurred and noised to its own degree."""

        def degrees(purpose: str) -> Tensor:
            values = randomness.rand(seed=self.seed, items=items, purpose=purpose)
            return values.to(images).view(-1, 1, 1, 1)

        noise = randomness.randn(images.shape[1:], seed=self.seed, items=items, purpose="wear").to(images)
        soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        return torch.lerp(images, soft, degrees("blur")) + self.noise * degrees("noise") * noise

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        read = self.judge.read(batch["image"])
        self._right.append(torch.stack([read[name] == batch["labels"][name] for name in ATTRIBUTES], dim=1))

    def on_validation_epoch_end(self) -> None:
        shares = torch.cat(self._right).float().mean(0).tolist()
        self._right.clear()
        self.accuracy = {name: round(share, 4) for name, share in zip(ATTRIBUTES, shares, strict=True)}
        self.print(f"accuracy on unseen images: {self.accuracy}")
        self.log_dict({f"val/{name}": share for name, share in self.accuracy.items()})

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["accuracy"] = self.accuracy

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.accuracy = checkpoint.get("accuracy", {})  # none in those of older versions

    configure_gradient_clipping = clip

    def configure_optimizers(self) -> dict:
        groups = {"judge": (self.judge, self.learning_rate)}
        fused = self.trainer.precision != "16-mixed"  # there the scaler must see the gradients first
        optimizer = build_optimizer(groups, fused=fused)
        schedule = Cosine(warmup_steps=self.warmup_steps)
        return with_schedule(optimizer, schedule, max_steps=self.trainer.max_steps)

    def export(self, path: Path, *, dtype: torch.dtype, metadata: dict[str, str]) -> Path:
        """Writes the judge, its shape and its accuracy (see `Judge.from_file`)."""
        tensors = self.judge.state_dict()
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        about = {"judge.config": json.dumps(self.judge.config), "judge.accuracy": json.dumps(self.accuracy)}
        write_tensors(path, tensors, metadata=metadata | about)
        return path
