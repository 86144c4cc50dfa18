"""Pretraining of the storybook's text encoder: classification of the attributes that captions name."""

from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.annotations import Node, NonNegativeFloat, NonNegativeInt
from ldm.checkpoints.save import save_model
from ldm.config import instantiate
from ldm.engine.gradients import clip
from ldm.models.text_encoder import CLIPTextEncoder
from ldm.optim.optimizers import build_optimizer, with_schedule
from ldm.optim.schedules import Cosine
from ldm.storybook.world import ATTRIBUTES


class TextEncoderTask(pl.LightningModule):
    """Trains the text encoder to tell from a caption which attributes its image shows.

    Stable Diffusion's text encoder comes from CLIP, which learned what captions say about images (Radford et
    al. 2021), and the UNet is trained on its fixed output. Here linear heads classify the attributes from the
    mean context of the padding, most of what the UNet attends to; afterwards the heads are discarded.

    Args:
        text_encoder: node of the text encoder.
        learning_rate: of AdamW, after `warmup_steps` and along a cosine to 0.
    """

    def __init__(
        self,
        *,
        text_encoder: Node,
        learning_rate: NonNegativeFloat = 1e-3,
        warmup_steps: NonNegativeInt = 100,
    ):
        super().__init__()
        self.text_encoder: CLIPTextEncoder = instantiate(text_encoder)
        width = self.text_encoder.transformer["text_model"].config.hidden_size
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(v)) for name, v in ATTRIBUTES.items()})
        self.learning_rate, self.warmup_steps = learning_rate, warmup_steps
        self._right: list[Tensor] = []

    def read(self, captions: list[str]) -> dict[str, Tensor]:
        """B captions -> {attribute: logits [B, number of its values]}."""
        ids = self.text_encoder.tokenize(captions).to(self.device)
        padding = (ids == self.text_encoder.pad_token_id).float()[..., None]
        pooled = (self.text_encoder(ids) * padding).sum(1) / padding.sum(1)
        return {name: head(pooled) for name, head in self.heads.items()}

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Attributes that a caption leaves out cannot be learned: their loss is their entropy."""
        logits = self.read(batch["caption"])
        loss = sum(F.cross_entropy(logits[name], batch["labels"][name]) for name in ATTRIBUTES)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        logits = self.read(batch["full_caption"])
        right = [logits[name].argmax(1) == batch["labels"][name] for name in ATTRIBUTES]
        self._right.append(torch.stack(right, dim=1))

    def on_validation_epoch_end(self) -> None:
        shares = torch.cat(self._right).float().mean(0).tolist()
        self._right.clear()
        accuracy = {name: round(share, 4) for name, share in zip(ATTRIBUTES, shares, strict=True)}
        self.print(f"accuracy on full captions: {accuracy}")
        self.log_dict({f"val/{name}": share for name, share in accuracy.items()})

    configure_gradient_clipping = clip

    def configure_optimizers(self) -> dict:
        groups = {"text_encoder": (self, self.learning_rate)}
        fused = self.trainer.precision != "16-mixed"  # there the scaler must see the gradients first
        optimizer = build_optimizer(groups, fused=fused)
        schedule = Cosine(warmup_steps=self.warmup_steps)
        return with_schedule(optimizer, schedule, max_steps=self.trainer.max_steps)

    def export(self, path: Path, *, dtype: torch.dtype, metadata: dict[str, str]) -> Path:
        """Writes the text encoder under Stable Diffusion's names, without the heads."""
        state_dicts = {"text_encoder": self.text_encoder.state_dict()}
        return save_model(path, state_dicts, alphas_cumprod=None, dtype=dtype, metadata=metadata)
