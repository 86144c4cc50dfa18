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

Index = tuple[bool, int]  # (is prior, item number): the two parts are numbered apart
Item = dict[str, Tensor | str | bool | int]
VALIDATION_START = 2**32  # steps and items from here on never train: no run gets there


@dataclass(frozen=True)
class Photo:
    """A picture file and its caption. Its contents name it: a renamed photo stays the same photo."""

    path: Path
    sha256: str  # of the file
    caption: str


@dataclass(frozen=True)
class View:
    """A photo as training shows it. `variant` numbers the random crops of a photo; None is the middle."""

    photo: Photo
    size: int  # pixels a side
    variant: int | None
    flip: bool
    seed: int

    @property
    def key(self) -> str:
        """Names the pixels: equal keys, equal pixels."""
        crop = "center" if self.variant is None else f"random-{self.seed}-{self.variant}"
        return f"{self.photo.sha256}/{self.size}/{crop}/{'flip' if self.flip else 'plain'}"

    def render(self) -> Tensor:
        """-> [3, H, W] in [-1, 1]."""
        image = _decoded(self.photo.path, self.photo.sha256)
        if self.variant is None:
            return to_tensor(fit_image(image, self.size, flip=self.flip))
        draws = generator(self.seed, self.variant, f"crop/{self.photo.sha256}")
        return to_tensor(fit_image(image, self.size, crop="random", flip=self.flip, generator=draws))


@dataclass(frozen=True)
class Part:
    """The subject's or the prior's half of the items, numbered from 0 over the whole run."""

    name: Literal["subject", "prior"]
    photos: tuple[Photo, ...]
    size: int  # pixels a side
    seed: int
    crop_variants: int | None  # random crops of each photo; None: the middle
    flip: bool  # half of the items are mirrored
    caption_dropout: float  # share of the items whose caption is empty, drawn for each
    empty_share: float = 0.0  # share of the items whose caption is empty, spread evenly over them
    held_out: tuple[Photo, ...] = ()  # what validation items show instead

    def view(self, item: int) -> View:
        """The view that an item shows. Every photo comes once in each pass over the photos."""
        photos = self.held_out if self.held_out and item >= VALIDATION_START else self.photos
        done, position = divmod(item, len(photos))
        order = torch.randperm(len(photos), generator=self._draws(done, "photo"))
        variant, flip = None, False
        if self.crop_variants is not None:
            variant = int(torch.randint(self.crop_variants, (), generator=self._draws(item, "crop")))
        if self.flip:
            flip = bool(torch.rand((), generator=self._draws(item, "flip")) < 0.5)
        return View(photos[order[position]], self.size, variant, flip, self.seed)

    def caption(self, item: int) -> str:
        """The caption of the photo that an item shows, or the empty one.

        `empty_share` is exact in any run of items: with 0.25 every fourth has it, so a step of four prior
        items has one, in the same place.
        """
        share = Fraction(self.empty_share).limit_denominator(1000)
        if floor((item + 1) * share) > floor(item * share):
            return ""
        dropped = torch.rand((), generator=self._draws(item, "dropout")) < self.caption_dropout
        return "" if dropped else self.view(item).photo.caption

    def views(self) -> list[View]:
        """Every view that any item can show, those of one photo side by side."""
        variants = [None] if self.crop_variants is None else range(self.crop_variants)
        flips = (False, True) if self.flip else (False,)
        photos = self.photos + self.held_out
        return [View(p, self.size, v, f, self.seed) for p in photos for v in variants for f in flips]

    def _draws(self, item: int, what: str) -> torch.Generator:
        return generator(self.seed, item, f"{self.name}/{what}")


class DreamBoothDataset(Dataset):
    """Index -> {"moments" [2z, h, w] or "image" [3, H, W] in [-1, 1], "caption", "is_prior", "item"}.

    fresh: numbers of prior items -> moments [2z, h, w] of a new prior image for each of them.
    """

    def __init__(
        self,
        parts: Mapping[bool, Part],
        moments: Mapping[str, Tensor] | None = None,
        fresh: Callable[[Sequence[int]], Sequence[Tensor]] | None = None,
    ):
        self.parts, self.moments, self.fresh = dict(parts), moments, fresh

    def __getitems__(self, indices: Sequence[Index]) -> list[Item]:
        """A batch; `fresh` draws what its prior items show, unless they are there to validate."""
        if self.fresh is None:
            return [self[index] for index in indices]
        new = [item for is_prior, item in indices if is_prior and item < VALIDATION_START]
        moments = dict(zip(new, self.fresh(new), strict=True)) if new else {}
        return [self._drawn(index[1], moments) if index[0] else self[index] for index in indices]

    def _drawn(self, item: int, moments: Mapping[int, Tensor]) -> Item:
        if item not in moments:
            return self[True, item]
        caption = self.parts[True].caption(item)
        return {"moments": moments[item], "caption": caption, "is_prior": True, "item": item}

    def __getitem__(self, index: Index) -> Item:
        is_prior, item = index
        part = self.parts[is_prior]
        view = part.view(item)
        shown = {"image": view.render()} if self.moments is None else {"moments": self.moments[view.key]}
        return {**shown, "caption": part.caption(item), "is_prior": is_prior, "item": item}


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
        self.sizes = {False: batch_size, True: prior_batch_size}
        self.accumulate, self.rank, self.world_size = accumulate, rank, world_size
        self.start_step = start_step

    def __iter__(self) -> Iterator[list[Index]]:
        for micro_step in count(self.start_step * self.accumulate):
            slot = micro_step * self.world_size + self.rank
            yield [(part, slot * size + i) for part, size in self.sizes.items() for i in range(size)]


def read_photos(
    folder: str | Path, *, caption: Callable[[Path], str], skip_unreadable: bool = False
) -> tuple[Photo, ...]:
    """The photos of a folder, sorted by name."""
    paths = list_images(folder, skip_unreadable=skip_unreadable)
    return tuple(Photo(path, file_sha256(path), caption(path)) for path in paths)


@lru_cache(maxsize=2)
def _decoded(path: Path, sha256: str) -> Image.Image:
    """The views of a photo are rendered one after the other: decode it once. Never changed in place."""
    return load_image(path)
