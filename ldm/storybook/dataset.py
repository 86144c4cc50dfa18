"""The storybook as training data: drawing k of a seeded, endless book."""

from collections.abc import Iterator

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ldm.data.images import to_tensor
from ldm.storybook.world import caption, draw, sample_scene

BOOK = 1_000_000_000  # drawings of one seed; seeds never share a drawing


class StorybookDataset(Dataset):
    """Item k: {"image" [3, size, size] in [-1, 1], "caption" str, "labels" {attribute: index}, "item" k}."""

    def __init__(self, *, size: int = 64, seed: int = 0, rare_word_share: float = 0.15):
        self.size, self.seed, self.rare_word_share = size, seed, rare_word_share

    def __getitem__(self, k: int) -> dict[str, Tensor | str | dict[str, int] | int]:
        scene = sample_scene(self.seed * BOOK + k)
        return {
            "image": to_tensor(draw(scene, size=self.size)),
            "caption": caption(scene, seed=scene.seed, rare_word_share=self.rare_word_share),
            "labels": scene.labels(),
            "item": k,
        }


class StorybookDataModule(pl.LightningDataModule):
    """Endless batches of fresh drawings, and a fixed set of unseen ones for validation.

    Args:
        size: pixels a side.
        batch_size: drawings per step.
        seed: of the book; validation reads the book of `seed + 1`.
        rare_word_share: share of captions that name the individual by a meaningless word.
        book_length: number of different drawings, read again from the start after the last; None is endless.
        validation_items: number of drawings in the validation set.
        num_workers: processes that draw.
    """

    def __init__(
        self,
        *,
        size: int = 64,
        batch_size: int = 16,
        seed: int = 0,
        rare_word_share: float = 0.15,
        book_length: int | None = None,
        validation_items: int = 256,
        num_workers: int = 0,
    ):
        super().__init__()
        self.batch_size, self.num_workers = batch_size, num_workers
        self.book_length, self.validation_items = book_length, validation_items
        self.train_set = StorybookDataset(size=size, seed=seed, rare_word_share=rare_word_share)
        self.validation_set = StorybookDataset(size=size, seed=seed + 1, rare_word_share=rare_word_share)
        self.start_step = 0  # optimizer steps already done: set it before training to resume

    def train_dataloader(self) -> DataLoader:
        batches = _Pages(self.batch_size, self.start_step, self.book_length)
        return DataLoader(self.train_set, batch_sampler=batches, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader:
        items = range(self.validation_items)
        return DataLoader(self.validation_set, batch_size=self.batch_size, sampler=items)


class _Pages(Sampler[list[int]]):
    """Consecutive item numbers from step `start_step` on, without end."""

    def __init__(self, batch_size: int, start_step: int, book_length: int | None):
        self.batch_size, self.start_step, self.book_length = batch_size, start_step, book_length or BOOK

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        while True:
            pages = np.arange(step * self.batch_size, (step + 1) * self.batch_size) % self.book_length
            yield pages.tolist()
            step += 1
