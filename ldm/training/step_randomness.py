"""The random numbers of a training step, made on the CPU and copied to the device at once."""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.process import NoiseProcess
from ldm.engine.device import can_pin
from ldm.randomness import ItemRNG, stream_ids


class StepRandomness(NamedTuple):
    """Random numbers of a micro-batch: views into one buffer, which is copied to the device at once."""

    timesteps: Tensor  # [B] int64
    posterior: Tensor  # [B, C, h, w], of the latents' posterior
    noise: Tensor  # [B, C, h, w]

    @classmethod
    def views(cls, buffer: Tensor, shape: Sequence[int]) -> "StepRandomness":
        """Views into a buffer. buffer: [bytes] uint8, on any device. shape: (B, C, h, w) of the latents."""
        count = shape[0]
        posterior, noise = buffer[8 * count :].view(torch.float32).split(prod(shape))
        return cls(buffer[: 8 * count].view(torch.int64), posterior.view(*shape), noise.view(*shape))


def latent_shape(batch: dict, *, channels: int, factor: int) -> tuple[int, int, int, int]:
    """(B, C, h, w) of the latents of a batch, given the autoencoder's channels and factor."""
    if "latent_stats" in batch:
        count, _, height, width = batch["latent_stats"].shape
        return count, channels, height, width
    count, _, height, width = batch["image"].shape
    return count, channels, height // factor, width // factor


def sample_randomness(batch: dict, seed: int, shape: Sequence[int], process: NoiseProcess) -> dict:
    """Additions to a batch, made on the CPU, so that the step never waits for the device.

    "stream_ids" (see `stream_ids`), and "randomness" [bytes] uint8, the buffer of `StepRandomness`, which is
    in pinned memory if there is a GPU.

    shape: (B, C, h, w) of the latents. process: it says how times and noise are distributed.
    """
    pinned, ids = can_pin(), stream_ids(batch)
    size = 8 * shape[0] + 4 * 2 * prod(shape)
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    views, rng = StepRandomness.views(buffer, shape), ItemRNG(seed, ids)
    process.sample_times(rng, views.timesteps)
    rng.randn("posterior", views.posterior)
    process.sample_noise(rng, views.noise)
    return {"stream_ids": ids, "randomness": buffer}
