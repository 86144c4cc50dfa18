"""The judge: a small network that reads a drawing's attributes off its pixels.

In the storybook it plays the part that CLIP and DINO have for photos: what does a picture show, and how far
apart are two pictures? The world knows the truth about its drawings, so the judge's own error is known too.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.storybook.world import ATTRIBUTES

SHIPPED = Path(__file__).resolve().parent / "assets" / "judge.safetensors"
SIZE = 64  # pixels a side


class DownBlock(nn.Module):
    """Residual block: [B, C, H, W] -> [B, C', H/2, W/2]."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(channels, out_channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.skip = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(channels, out_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.path(x) + self.skip(x))


class Judge(nn.Module):
    """Pictures [B, 3, 64, 64] in [-1, 1] -> {attribute: logits [B, number of its values]}.

    Args:
        channels: of the convolutions, each at half the resolution of the one before, from 32 x 32 on.
        width: D, of the feature vector.
    """

    def __init__(self, *, channels: tuple[int, ...] = (32, 64, 96, 128), width: int = 192):
        super().__init__()
        self.config = {"channels": list(channels), "width": width}
        stem = nn.Conv2d(3, channels[0], 5, stride=2, padding=2)
        halvings = [DownBlock(*pair) for pair in zip(channels, channels[1:], strict=False)]
        self.body = nn.Sequential(stem, nn.ReLU(), *halvings)
        cells = (SIZE >> len(channels)) ** 2
        self.embed = nn.Linear(channels[-1] * cells, width)
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(v)) for name, v in ATTRIBUTES.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        hidden = F.relu(self._embed(images))
        return {name: head(hidden) for name, head in self.heads.items()}

    @torch.inference_mode()
    def read(self, images: Tensor) -> dict[str, Tensor]:
        """[B, 3, 64, 64] -> {attribute: index into its values [B]}."""
        return {name: logits.argmax(1) for name, logits in self(images).items()}

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """[B, 3, 64, 64] -> [B, D] of unit norm."""
        return F.normalize(self._embed(images), dim=1)

    def _embed(self, images: Tensor) -> Tensor:
        return self.embed(self.body(images).flatten(1))

    @classmethod
    def from_file(cls, path: str | Path = SHIPPED) -> "Judge":
        """In float32, for reading; `accuracy` holds {attribute: share read right of unseen drawings}."""
        if not Path(path).is_file():
            remedy = "Train it: python main.py --base configs/storybook/judge.yaml"
            raise UserError("The judge's weights are missing", where=path, remedy=remedy)
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        if "judge.config" not in about:
            raise UserError("This is no judge", where=path, remedy=f"The shipped one is {SHIPPED}.")
        judge = cls(**json.loads(about["judge.config"]))
        judge.load_state_dict(tensors)
        judge.accuracy = json.loads(about["judge.accuracy"])
        return judge.eval().requires_grad_(False)
