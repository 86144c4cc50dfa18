"""The judge: an attribute classifier for storybook images.

It does for the storybook what CLIP and DINO do for photos: it says what an image shows, and its features say
how different two images are. Images of the world come with their true attributes, so its accuracy is known.
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
    """Residual block with stride 2: [B, C, H, W] -> [B, C', H/2, W/2]."""

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
    """Attribute classifier: images [B, 3, 64, 64] in [-1, 1] -> {attribute: logits [B, number of values]}.

    Args:
        channels: of the blocks, each at half the resolution of the one before, from 32 x 32 on.
        width: D, the size of the feature vector.
    """

    def __init__(self, *, channels: tuple[int, ...] = (32, 64, 96, 128), width: int = 192):
        super().__init__()
        self.config = {"channels": list(channels), "width": width}
        stem = nn.Conv2d(3, channels[0], 5, stride=2, padding=2)
        blocks = [DownBlock(*pair) for pair in zip(channels, channels[1:], strict=False)]
        self.body = nn.Sequential(stem, nn.ReLU(), *blocks)
        cells = (SIZE >> len(channels)) ** 2
        self.embed = nn.Linear(channels[-1] * cells, width)
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(v)) for name, v in ATTRIBUTES.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        hidden = F.relu(self._embed(images))
        return {name: head(hidden) for name, head in self.heads.items()}

    @torch.inference_mode()
    def read(self, images: Tensor) -> dict[str, Tensor]:
        """Predicted attributes. images: [B, 3, 64, 64] -> {attribute: index into its values [B]}."""
        return {name: logits.argmax(1) for name, logits in self(images).items()}

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """Features of unit norm. images: [B, 3, 64, 64] -> [B, D]."""
        return F.normalize(self._embed(images), dim=1)

    def _embed(self, images: Tensor) -> Tensor:
        return self.embed(self.body(images).flatten(1))

    @classmethod
    def from_file(cls, path: str | Path = SHIPPED) -> "Judge":
        """Loads weights, frozen and in float32; `accuracy` is {attribute: accuracy on held-out images}."""
        if not Path(path).is_file():
            remedy = "Train it: python main.py --base configs/storybook/judge.yaml"
            raise UserError("The judge's weights are missing", where=path, remedy=remedy)
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        if "judge.config" not in about:
            raise UserError("This is not a judge file", where=path, remedy=f"The shipped one is {SHIPPED}.")
        judge = cls(**json.loads(about["judge.config"]))
        judge.load_state_dict(tensors)
        judge.accuracy = json.loads(about["judge.accuracy"])
        return judge.eval().requires_grad_(False)
