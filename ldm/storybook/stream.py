"""The storybook as an endless stream of captioned images for the base model, from worker processes.

Batch n is a function of (seed, n), whichever worker makes it. Images are transferred as uint8 and are
converted and encoded by the VAE on the device, once for all their captions.
"""

import os
from collections.abc import Callable

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ldm.annotations import NonNegativeInt, PositiveInt, Probability, Seed
from ldm.data.latents import Encode
from ldm.errors import UserError
from ldm.randomness import generator
from ldm.storybook.dataset import SCENES_PER_SEED, BatchNumbers
from ldm.storybook.judge import SIZE
from ldm.storybook.world import caption, draw, sample_scene

Prepare = Callable[[dict], dict]  # what a worker adds to a batch: token ids, noise, timesteps
PREFETCHED = 4  # batches that each worker prepares ahead


class StorybookBatches(Dataset):
    """Batch n: images n * P ... of a seed, P = batch_size / captions_per_image, and their items.

    {"image" [P, 3, 64, 64] uint8, "caption" B strings, "item" [B] int64, "stream" B times "subject"}. Item k
    has image k // captions_per_image with its own caption; the share `caption_dropout` of them is
    empty, which teaches the unconditional prediction of classifier-free guidance (Ho and Salimans 2022).
    `prepare` runs in the worker.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        seed: int,
        captions_per_image: int = 1,
        caption_dropout: float = 0.1,
        prepare: Prepare | None = None,
    ):
        if batch_size % captions_per_image:
            what = f"A batch of {batch_size} items cannot hold {captions_per_image} captions of each image"
            remedy = "Make data.params.batch_size a multiple of data.params.captions_per_image."
            raise UserError(what, where="data.params.batch_size", remedy=remedy)
        self.images = batch_size // captions_per_image
        self.seed = seed
        self.captions_per_image = captions_per_image
        self.caption_dropout = caption_dropout
        self.prepare = prepare

    def __getitem__(self, n: int) -> dict:
        first = n * self.images
        images = torch.stack([self.image(k) for k in range(first, first + self.images)])
        items = torch.arange(first * self.captions_per_image, (first + self.images) * self.captions_per_image)
        batch = {
            "image": images,
            "caption": [self.caption(k) for k in items.tolist()],
            "item": items,
            "stream": ["subject"] * len(items),
        }
        return self.prepare(batch) if self.prepare else batch

    def image(self, k: int) -> Tensor:
        """[3, 64, 64] uint8."""
        return torch.from_numpy(np.array(draw(sample_scene(self.seed * SCENES_PER_SEED + k)))).permute(
            2, 0, 1
        )

    def caption(self, item: int) -> str:
        dropped = torch.rand((), generator=generator(self.seed, item, "caption dropout"))
        scene = sample_scene(self.seed * SCENES_PER_SEED + item // self.captions_per_image)
        return (
            "" if dropped < self.caption_dropout else caption(scene, seed=self.seed * SCENES_PER_SEED + item)
        )


class StorybookStream(pl.LightningDataModule):
    """Endless training batches of new images, and a fixed set of validation batches.

    Args:
        batch_size: items per step and device.
        seed: of the images; validation has those of `seed + 1`.
        captions_per_image: items that share an image, each with its own caption, noise and timestep.
        caption_dropout: share of items with an empty caption.
        validation_items: number of items in the validation set.
        num_workers: of the data loader; None is one for each core but one, 0 is none.
    """

    def __init__(
        self,
        *,
        batch_size: PositiveInt = 16,
        seed: Seed = 0,
        captions_per_image: PositiveInt = 1,
        caption_dropout: Probability = 0.1,
        validation_items: PositiveInt = 256,
        num_workers: NonNegativeInt | None = None,
    ):
        super().__init__()
        self.size = SIZE
        self.num_workers = _cores() if num_workers is None else num_workers
        self.validation_batches = max(1, validation_items // batch_size)
        items = {"batch_size": batch_size, "caption_dropout": caption_dropout}
        self.train_set = StorybookBatches(seed=seed, captions_per_image=captions_per_image, **items)
        self.validation_set = StorybookBatches(seed=seed + 1, **items)
        self.start_step = 0  # optimizer steps already done: set it before training to resume
        self.attach()

    def attach(self, *, encode: Encode | None = None, vae_hash: str = "") -> None:
        """Sets the VAE's encoder (images -> latent stats); latents are not cached, so no hash is used."""
        self.encode = encode

    def set_prepare(self, prepare: Prepare) -> None:
        """Sets what the workers add to every batch."""
        self.train_set.prepare = prepare
        self.validation_set.prepare = prepare

    def train_dataloader(self) -> DataLoader:
        return self.loader(self.train_set, BatchNumbers(self.trainer, self.start_step))

    def val_dataloader(self) -> DataLoader:
        return self.loader(self.validation_set, range(self.validation_batches))

    def loader(self, batches: StorybookBatches, numbers: Sampler[int] | range) -> DataLoader:
        """Batches of these numbers in their order, drawn ahead by the workers."""
        workers = self.num_workers if batches is self.train_set else min(self.num_workers, 1)
        return DataLoader(
            batches,
            batch_size=None,
            sampler=numbers,
            num_workers=workers,
            prefetch_factor=PREFETCHED if workers else None,
            pin_memory=torch.cuda.is_available(),
        )

    def on_after_batch_transfer(self, batch: dict, dataloader_idx: int) -> dict:
        """Images -> "latent_stats" [B, 2C, h, w], encoded on the device to keep the copy small."""
        if self.encode is None:
            return batch
        latent_stats = self.encode(to_float(batch["image"]))
        rest = {key: value for key, value in batch.items() if key != "image"}
        return rest | {
            "latent_stats": latent_stats.repeat_interleave(len(batch["item"]) // len(latent_stats), 0)
        }


def to_float(images: Tensor) -> Tensor:
    """[..., H, W] uint8 -> float32 in [-1, 1], as by `ldm.data.images.to_tensor`."""
    return images.float() / 127.5 - 1


def _cores() -> int:
    """Cores that this process may use, but one, which is left to training."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, found - 1)
