"""Training items: which view of which photo item k shows, a pure function of (seed, k).

A view is a photo with its crop and mirroring. A photo has a fixed, finite number of them, so that
what the VAE says of each can be cached, random crops and mirrored views included.

Items are numbered over the whole run, subject and prior apart. Optimizer step n takes the items
n * effective_batch + i, effective_batch = batch_size * accumulate * world_size, however they are
spread over ranks and micro-batches; so resuming is nothing but starting at another step.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import count
from math import floor
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ldm.data.images import fit_image, list_images, load_image, to_tensor
from ldm.files import file_sha256
from ldm.randomness import generator

StreamName = Literal["subject", "prior"]
Index = tuple[StreamName, int]  # (stream, item number): the two streams are numbered apart
Item = dict[str, Tensor | str | bool | int]
VALIDATION_START = 2**32  # steps and items from here on never train: no run gets there


@dataclass(frozen=True)
class SourceImage:
    """A picture file and its caption. Its contents name it: a renamed photo stays the same photo."""

    path: Path
    sha256: str  # of the file
    caption: str


@dataclass(frozen=True)
class TrainingView:
    """A photo as training shows it. `crop_index` numbers the random crops of a photo; None is the middle."""

    source: SourceImage
    size: int  # pixels a side
    crop_index: int | None
    flip: bool
    seed: int

    @property
    def key(self) -> str:
        """Names the pixels: equal keys, equal pixels."""
        crop = "center" if self.crop_index is None else f"random-{self.seed}-{self.crop_index}"
        return f"{self.source.sha256}/{self.size}/{crop}/{'flip' if self.flip else 'plain'}"

    def render(self) -> Tensor:
        """-> [3, H, W] in [-1, 1]."""
        image = _decoded(self.source.path, self.source.sha256)
        if self.crop_index is None:
            return to_tensor(fit_image(image, self.size, flip=self.flip))
        draws = generator(self.seed, self.crop_index, f"crop/{self.source.sha256}")
        return to_tensor(fit_image(image, self.size, crop="random", flip=self.flip, generator=draws))


@dataclass(frozen=True)
class Stream:
    """The subject's or the prior's half of the items, numbered from 0 over the whole run."""

    name: StreamName
    sources: tuple[SourceImage, ...]
    size: int  # pixels a side
    seed: int
    crop_variants: int | None  # random crops of each photo; None: the middle
    flip: bool  # half of the items are mirrored
    caption_dropout: float  # share of the items whose caption is empty, drawn for each
    empty_share: float = 0.0  # share of the items whose caption is empty, spread evenly over them
    held_out: tuple[SourceImage, ...] = ()  # what validation items show instead

    def view(self, item: int) -> TrainingView:
        """The view that an item shows. Every photo comes once in each pass over the photos."""
        sources = self.held_out if self.held_out and item >= VALIDATION_START else self.sources
        done, position = divmod(item, len(sources))
        order = torch.randperm(len(sources), generator=self._draws(done, "photo"))
        crop_index, flip = None, False
        if self.crop_variants is not None:
            crop_index = int(torch.randint(self.crop_variants, (), generator=self._draws(item, "crop")))
        if self.flip:
            flip = bool(torch.rand((), generator=self._draws(item, "flip")) < 0.5)
        return TrainingView(sources[order[position]], self.size, crop_index, flip, self.seed)

    def caption(self, item: int) -> str:
        """The caption of the photo that an item shows, or the empty one.

        `empty_share` is exact in any run of items: with 0.25 every fourth has it, so a step of four prior
        items has one, in the same place.
        """
        share = Fraction(self.empty_share).limit_denominator(1000)
        if floor((item + 1) * share) > floor(item * share):
            return ""
        dropped = torch.rand((), generator=self._draws(item, "dropout")) < self.caption_dropout
        return "" if dropped else self.view(item).source.caption

    def views(self) -> list[TrainingView]:
        """Every view that any item can show, those of one photo side by side."""
        crops = [None] if self.crop_variants is None else range(self.crop_variants)
        flips = (False, True) if self.flip else (False,)
        sources = self.sources + self.held_out
        return [TrainingView(p, self.size, v, f, self.seed) for p in sources for v in crops for f in flips]

    def _draws(self, item: int, what: str) -> torch.Generator:
        return generator(self.seed, item, f"{self.name}/{what}")


class DreamBoothDataset(Dataset):
    """Index -> {"latent_stats" [2z, h, w] or "image" [3, H, W] in [-1, 1], "caption", "is_prior", "item"}.

    online_priors: numbers of prior items -> latent stats [2z, h, w] of a new prior image for each of them.
    """

    def __init__(
        self,
        streams: Mapping[StreamName, Stream],
        latent_stats: Mapping[str, Tensor] | None = None,
        online_priors: Callable[[Sequence[int]], Sequence[Tensor]] | None = None,
    ):
        self.streams, self.latent_stats, self.online_priors = dict(streams), latent_stats, online_priors

    def __getitems__(self, indices: Sequence[Index]) -> list[Item]:
        """A batch; `online_priors` draws what its prior items show, unless they are there to validate."""
        if self.online_priors is None:
            return [self[index] for index in indices]
        new = [item for stream, item in indices if stream == "prior" and item < VALIDATION_START]
        latent_stats = dict(zip(new, self.online_priors(new), strict=True)) if new else {}
        return [
            self._generated(item, latent_stats) if stream == "prior" else self[stream, item]
            for stream, item in indices
        ]

    def _generated(self, item: int, latent_stats: Mapping[int, Tensor]) -> Item:
        if item not in latent_stats:
            return self["prior", item]
        caption = self.streams["prior"].caption(item)
        return {"latent_stats": latent_stats[item], "caption": caption, "is_prior": True, "item": item}

    def __getitem__(self, index: Index) -> Item:
        name, item = index
        stream = self.streams[name]
        view = stream.view(item)
        shown = (
            {"image": view.render()}
            if self.latent_stats is None
            else {"latent_stats": self.latent_stats[view.key]}
        )
        return {**shown, "caption": stream.caption(item), "is_prior": name == "prior", "item": item}


class ItemBatches(Sampler[list[Index]]):
    """Endless micro-batches of one rank: its subject items, then its prior items, from `start_step` on."""

    def __init__(
        self,
        *,
        batch_size: int,
        prior_batch_size: int,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
    ):
        self.sizes: dict[StreamName, int] = {"subject": batch_size, "prior": prior_batch_size}
        self.accumulate, self.rank, self.world_size = accumulate, rank, world_size
        self.start_step = start_step

    def __iter__(self) -> Iterator[list[Index]]:
        for micro_step in count(self.start_step * self.accumulate):
            slot = micro_step * self.world_size + self.rank
            yield [(stream, slot * size + i) for stream, size in self.sizes.items() for i in range(size)]


def read_source_images(
    folder: str | Path, *, caption: Callable[[Path], str], skip_unreadable: bool = False
) -> tuple[SourceImage, ...]:
    """The photos of a folder, sorted by name."""
    paths = list_images(folder, skip_unreadable=skip_unreadable)
    return tuple(SourceImage(path, file_sha256(path), caption(path)) for path in paths)


@lru_cache(maxsize=2)
def _decoded(path: Path, sha256: str) -> Image.Image:
    """The views of a photo are rendered one after the other: decode it once. Never changed in place."""
    return load_image(path)
