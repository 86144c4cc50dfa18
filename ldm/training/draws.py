"""The random numbers of training: each is a function of (seed, item, part, purpose), in any batch."""

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ldm import randomness

Keys = Sequence[tuple[int, str]]  # (item number, part) of each item of a batch: what names its draws


def item_keys(batch: dict) -> list[tuple[int, str]]:
    """(item number, part) of each item of a batch: what names its draws."""
    parts = ("prior" if prior else "subject" for prior in batch["is_prior"].tolist())
    return list(zip(batch["item"].tolist(), parts, strict=True))


class ItemDraws:
    """The random draws of a batch, each a function of (seed, item number, part, purpose), made on the CPU."""

    def __init__(self, seed: int, keys: Keys):
        self.seed = seed
        self.keys = keys

    def randn(self, purpose: str, out: Tensor) -> None:
        """Fills `out` [B, ...] with standard normal noise."""
        self._each(purpose, lambda row, g: torch.randn(row.shape, generator=g, out=row), out)

    def randint(self, purpose: str, high: int, out: Tensor) -> None:
        """Fills `out` [B] with uniform integers in [0, high)."""
        self._each(purpose, lambda row, g: torch.randint(high, row.shape, generator=g, out=row), out)

    def _each(self, purpose: str, fill: Callable[[Tensor, torch.Generator], Tensor], out: Tensor) -> None:
        for row, (item, part) in zip(out, self.keys, strict=True):
            fill(row, randomness.generator(self.seed, item, f"{part}/{purpose}"))


class StepDraws(NamedTuple):
    """What a micro-batch draws: views into one buffer, which crosses to the device in one copy."""

    timesteps: Tensor  # [B] int64
    posterior: Tensor  # [B, C, h, w], of the latents' posterior
    noise: Tensor  # [B, C, h, w]
    offset: Tensor  # [B, C, 1, 1], of offset noise; 0 without it

    @classmethod
    def views(cls, buffer: Tensor, shape: Sequence[int]) -> "StepDraws":
        """buffer: [bytes] uint8, on any device. shape: (B, C, h, w) of the latents."""
        count, channels = shape[:2]
        numbers = buffer[8 * count :].view(torch.float32)
        posterior, noise, offset = numbers.split([prod(shape), prod(shape), count * channels])
        return cls(
            buffer[: 8 * count].view(torch.int64),
            posterior.view(*shape),
            noise.view(*shape),
            offset.view(count, channels, 1, 1),
        )


def latent_shape(batch: dict, *, channels: int, factor: int) -> tuple[int, int, int, int]:
    """(B, C, h, w) of the latents of a batch of moments or images; an autoencoder's channels and factor."""
    if "moments" in batch:
        count, _, height, width = batch["moments"].shape
        return count, channels, height, width
    count, _, height, width = batch["image"].shape
    return count, channels, height // factor, width // factor


def drawn(batch: dict, seed: int, shape: Sequence[int], *, timesteps: int, offset: bool) -> dict:
    """What a step needs besides its items, made on the CPU, because reading or drawing later would wait.

    "keys" (see `item_keys`), "prior_rows" [number of prior items] int64, and "draws" [bytes] uint8: all of
    `StepDraws`. The latter two are pinned where there is a GPU to copy them to.

    shape: (B, C, h, w) of the latents. timesteps: T, of the schedule. offset: whether there is offset noise.
    """
    pinned, keys = torch.cuda.is_available(), item_keys(batch)
    rows = [row for row, (_, part) in enumerate(keys) if part == "prior"]
    size = 8 * shape[0] + 4 * (2 * prod(shape) + shape[0] * shape[1])
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    views, draws = StepDraws.views(buffer, shape), ItemDraws(seed, keys)
    draws.randint("timestep", timesteps, views.timesteps)
    draws.randn("posterior", views.posterior)
    draws.randn("noise", views.noise)
    if offset:
        draws.randn("offset", views.offset)
    else:
        views.offset.zero_()
    prior_rows = torch.tensor(rows, dtype=torch.int64, pin_memory=pinned)
    return {"keys": keys, "prior_rows": prior_rows, "draws": buffer}
