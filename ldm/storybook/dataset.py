"""The storybook as training data: image k of an endless data set, a function of (seed, k)."""

import itertools
from collections.abc import Iterator

import pytorch_lightning as pl
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ldm.annotations import NonNegativeInt, PositiveInt, Probability, Seed
from ldm.data.images import to_tensor
from ldm.storybook.world import caption, draw, full_caption, sample_scene

SCENES_PER_SEED = 1_000_000_000  # images of one seed; no two seeds share an image


class StorybookDataset(Dataset):
    """Item k: {"image" [3, size, size] in [-1, 1], "caption", "labels" {attribute: index}, "item" k}.

    Without `pictures` it has a "full_caption", which names every attribute, in place of the image.
    """

    def __init__(
        self, *, size: int = 64, seed: int = 0, rare_word_share: float = 0.15, pictures: bool = True
    ):
        self.size, self.seed, self.rare_word_share, self.pictures = size, seed, rare_word_share, pictures

    def __getitem__(self, k: int) -> dict[str, Tensor | str | dict[str, int] | int]:
        scene = sample_scene(self.seed * SCENES_PER_SEED + k)
        item = {
            "caption": caption(scene, seed=scene.seed, rare_word_share=self.rare_word_share),
            "labels": scene.labels(),
            "item": k,
            "stream": "subject",
        }
        if self.pictures:
            return item | {"image": to_tensor(draw(scene, size=self.size))}
        return item | {"full_caption": full_caption(scene)}


class StorybookDataModule(pl.LightningDataModule):
    """Endless batches of new images, and a fixed validation set of other images.

    Args:
        size: pixels a side.
        batch_size: items per step and device.
        seed: of the images; validation has those of `seed + 1`.
        rare_word_share: share of captions that name the subject by a rare word.
        pictures: False yields captions without images.
        validation_items: number of items in the validation set.
        num_workers: worker processes of the data loader.
    """

    def __init__(
        self,
        *,
        size: PositiveInt = 64,
        batch_size: PositiveInt = 16,
        seed: Seed = 0,
        rare_word_share: Probability = 0.15,
        pictures: bool = True,
        validation_items: PositiveInt = 256,
        num_workers: NonNegativeInt = 0,
    ):
        super().__init__()
        self.size = size
        self.batch_size, self.num_workers = batch_size, num_workers
        self.validation_items = validation_items
        drawings = {"size": size, "rare_word_share": rare_word_share, "pictures": pictures}
        self.train_set: Dataset = StorybookDataset(seed=seed, **drawings)
        self.validation_set = StorybookDataset(seed=seed + 1, **drawings)
        self.start_step = 0  # optimizer steps already done: set it before training to resume

    def train_dataloader(self) -> DataLoader:
        batches = _Pages(BatchNumbers(self.trainer, self.start_step), self.batch_size)
        return DataLoader(self.train_set, batch_sampler=batches, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader:
        items = range(self.validation_items)
        return DataLoader(self.validation_set, batch_size=self.batch_size, sampler=items)


class BatchNumbers(Sampler[int]):
    """Numbers of the micro-batches of a Trainer's process from an optimizer step on, without end.

    trainer: None is one process without accumulation.
    """

    def __init__(self, trainer: pl.Trainer | None, start_step: int):
        self.world_size = trainer.world_size if trainer else 1
        micro_batches = start_step * (trainer.accumulate_grad_batches if trainer else 1)
        self.first = micro_batches * self.world_size + (trainer.global_rank if trainer else 0)

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.first, self.world_size)


class _Pages(Sampler[list[int]]):
    """The item numbers of these batches."""

    def __init__(self, numbers: BatchNumbers, batch_size: int):
        self.numbers = numbers
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for number in self.numbers:
            yield list(range(number * self.batch_size, (number + 1) * self.batch_size))
