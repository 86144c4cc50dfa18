"""Training items: which view of which image item k shows, a pure function of (seed, k).

A view is an image with a crop and perhaps mirrored. Every image has a finite number of views, random crops
included, so that their latents can be cached.

Items are numbered over the whole run, separately in each stream (subject and prior). Optimizer step n takes
the items n * effective_batch + i, effective_batch = batch_size * accumulate * world_size, however they are
divided among ranks and micro-batches; so resuming only means starting at another step. With aspect-ratio
buckets all items of a step are of one bucket, whose items are numbered likewise over its own steps (`Place`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from itertools import count
from math import floor
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ldm.data.buckets import Shape
from ldm.data.captions import Captions, CaptionShuffle, draw_caption
from ldm.data.images import crop_to, fit_image, list_images, load_image, to_tensor, upright_size
from ldm.files import file_sha256
from ldm.randomness import generator
from ldm.shipped import find_file

StreamName = Literal["subject", "prior"]


class Place(NamedTuple):
    """Where an item stands among those of its step's bucket."""

    bucket: int
    number: int  # of the item in the bucket's stream


Index = tuple[StreamName, int] | tuple[StreamName, int, Place]  # (stream, item number); Place: of buckets
Item = dict[str, Tensor | str | int]
VALIDATION_START = 2**32  # steps and items from here on are for validation; no run gets there


@dataclass(frozen=True)
class SourceImage:
    """An image file and its captions, identified by its content rather than its name."""

    path: Path
    sha256: str  # of the file
    captions: Captions

    @property
    def upright_size(self) -> tuple[int, int]:
        """(height, width) in pixels, rotated by EXIF."""
        return _upright_size(self.path, self.sha256)


@dataclass(frozen=True)
class TrainingView:
    """An image as training shows it. crop_index: number of the random crop; None is the centre crop."""

    source: SourceImage
    shape: Shape
    crop_index: int | None
    flip: bool
    seed: int

    @property
    def key(self) -> str:
        """Identifies the pixels."""
        crop = "center" if self.crop_index is None else f"random-{self.seed}-{self.crop_index}"
        height, width = self.shape
        size = height if self.shape.is_square else f"{height}x{width}"
        return f"{self.source.sha256}/{size}/{crop}/{'flip' if self.flip else 'plain'}"

    def render(self) -> Tensor:
        """The pixels -> [3, H, W] in [-1, 1]."""
        image = _decoded(self.source.path, self.source.sha256)
        return to_tensor(fit_image(image, self.shape, flip=self.flip, **self._crop()))

    def sizes(self) -> Tensor:
        """[6] int64 in pixels: height and width of the original, top and left of the crop, height and width.

        The crop is in the original scaled to the training size, mirrored where the view is (Podell et al.
        2023, sec. 2.2: what SDXL is told).
        """
        height, width = self.source.upright_size
        left, top, wide, high = self.crop_box()
        left = width - wide - left if self.flip else left
        scaled = [round(top * self.shape.height / high), round(left * self.shape.width / wide)]
        return torch.tensor([height, width, *scaled, *self.shape])

    def crop_box(self) -> tuple[int, int, float, float]:
        """(left, top, width, height) of the crop in pixels of the upright original, before it is mirrored."""
        height, width = self.source.upright_size
        return crop_to(self.shape, width, height, **self._crop())

    def _crop(self) -> dict[str, Any]:
        """Which crop it is: what `fit_image` and `crop_to` take."""
        if self.crop_index is None:
            return {"crop": "center"}
        draws = generator(self.seed, self.crop_index, f"crop/{self.source.sha256}")
        return {"crop": "random", "generator": draws}


@dataclass(frozen=True)
class Stream:
    """The subject items or the prior items, numbered from 0 over the whole run."""

    name: StreamName
    sources: tuple[SourceImage, ...]
    shape: Shape
    seed: int
    crop_variants: int | None  # number of random crops of each image; None: the centre crop
    flip: bool  # half of the items are mirrored
    caption_dropout: float  # share of the items whose caption is empty, drawn for each
    empty_share: float = 0.0  # share of the items whose caption is empty, spread evenly over them
    held_out: tuple[SourceImage, ...] = ()  # images of the validation items
    of_class: Callable[[str], str] | None = None  # a caption of the subject -> one of its class
    shuffle: CaptionShuffle | None = None  # of the parts of captions
    label: str = ""  # tells the draws of several concepts' streams apart

    def view(self, item: int) -> TrainingView:
        """The view of an item. Items go over the images in random order, one epoch after the other."""
        sources = self.held_out if self.held_out and item >= VALIDATION_START else self.sources
        done, position = divmod(item, len(sources))
        order = torch.randperm(len(sources), generator=self._draws(done, "photo"))
        crop_index, flip = None, False
        if self.crop_variants is not None:
            crop_index = int(torch.randint(self.crop_variants, (), generator=self._draws(item, "crop")))
        if self.flip:
            flip = bool(torch.rand((), generator=self._draws(item, "flip")) < 0.5)
        return TrainingView(sources[order[position]], self.shape, crop_index, flip, self.seed)

    def caption(self, item: int) -> str:
        """The caption of an item: that of its image, or the empty one.

        `empty_share` is exact among consecutive items: with 0.25 every fourth has an empty caption, so a step
        of four prior items has one, at the same position.
        """
        if is_among_share(item, self.empty_share):
            return ""
        if torch.rand((), generator=self._draws(item, "dropout")) < self.caption_dropout:
            return ""
        return draw_caption(self.view(item).source.captions, self.shuffle, partial(self._draws, item))

    def captions(self, item: int) -> dict[str, str]:
        """{"caption", "class_caption"}: what the network is told of an item, and what the base is."""
        caption = self.caption(item)
        return {"caption": caption, "class_caption": self.of_class(caption) if self.of_class else caption}

    def views(self) -> list[TrainingView]:
        """All possible views, those of one image next to each other."""
        crops = [None] if self.crop_variants is None else range(self.crop_variants)
        flips = (False, True) if self.flip else (False,)
        sources = self.sources + self.held_out
        return [TrainingView(p, self.shape, v, f, self.seed) for p in sources for v in crops for f in flips]

    def _draws(self, item: int, what: str) -> torch.Generator:
        return generator(self.seed, item, f"{self.name}{self.label}/{what}")


def is_among_share(item: int, share: float) -> bool:
    """Whether an item is one of this share of all items, which are spread evenly: every fourth of 0.25."""
    exact = Fraction(share).limit_denominator(1000)
    return floor((item + 1) * exact) > floor(item * exact)


class ItemStream(Protocol):
    """What a data set needs of a stream: `Stream`, or `ldm.data.streams.MixedStream` of several."""

    shape: Shape

    def view(self, item: int) -> TrainingView: ...

    def captions(self, item: int) -> dict[str, str]: ...

    def views(self) -> list[TrainingView]: ...


class DreamBoothDataset(Dataset):
    """Index -> {"latent_stats" [2z, h, w] or "image" [3, H, W] in [-1, 1], "sizes" [6] (see
    `TrainingView.sizes`), "caption", "class_caption" (what the base is told), "stream", "item"}, with `masks`
    also "mask" [1, h, w].

    streams: with several buckets a `BucketStream` each, and an index then has its place there.
    masks: of the subject's views, in latent pixels, 1 where the subject is; prior items are all subject.
    online_priors: streams of prior items and their numbers there -> latent stats [2z, h, w] of a new prior
    image for each.
    """

    def __init__(
        self,
        streams: Mapping[StreamName, "ItemStream | BucketStream"],
        latent_stats: Mapping[str, Tensor] | None = None,
        online_priors: Callable[[Sequence[tuple[ItemStream, int]]], Sequence[Tensor]] | None = None,
        *,
        masks: Mapping[TrainingView, Tensor] | None = None,
    ):
        self.streams = dict(streams)
        self.latent_stats = latent_stats
        self.masks = masks
        self.whole = {view.shape: torch.ones_like(mask) for view, mask in (masks or {}).items()}
        self.online_priors = online_priors

    def __getitems__(self, indices: Sequence[Index]) -> list[Item]:
        """A batch; `online_priors` generates the images of its prior items, except in validation."""
        if self.online_priors is None:
            return [self[index] for index in indices]
        new = [index for index in indices if index[0] == "prior" and index[1] < VALIDATION_START]
        generated = self.online_priors([self._of(index) for index in new]) if new else []
        latent_stats = dict(zip(new, generated, strict=True))
        return [
            self._generated(index, latent_stats[index]) if index in latent_stats else self[index]
            for index in indices
        ]

    def _of(self, index: Index) -> tuple[ItemStream, int]:
        """The stream of an item, and its number there."""
        name, item, *place = index
        stream = self.streams[name]
        return stream.at(*place) if place else (stream, item)

    def _generated(self, index: Index, latent_stats: Tensor) -> Item:
        stream, number = self._of(index)
        generated = {
            "latent_stats": latent_stats,
            "sizes": torch.tensor([*stream.shape, 0, 0, *stream.shape]),
            **self._mask(None, stream.shape),
        }
        return {**generated, **stream.captions(number), "stream": "prior", "item": index[1]}

    def __getitem__(self, index: Index) -> Item:
        name, item = index[:2]
        stream, number = self._of(index)
        view = stream.view(number)
        shown = (
            {"image": view.render()}
            if self.latent_stats is None
            else {"latent_stats": self.latent_stats[view.key]}
        )
        shown["sizes"] = view.sizes()
        shown |= self._mask(view if name == "subject" else None, view.shape)
        return {**shown, **stream.captions(number), "stream": name, "item": item}

    def _mask(self, view: TrainingView | None, shape: Shape) -> dict[str, Tensor]:
        """The mask of a view of the subject, or that of an item all of which is learnt."""
        if self.masks is None:
            return {}
        return {"mask": self.whole[shape] if view is None else self.masks[view]}


class BucketStream:
    """The items of one name in several buckets: a stream for each, and one of its validation items.

    training, validation: by bucket; None where a bucket has no validation items.
    """

    def __init__(self, training: Sequence[ItemStream], validation: Sequence[ItemStream | None]):
        self.training = tuple(training)
        self.validation = tuple(validation)

    def at(self, place: Place) -> tuple[ItemStream, int]:
        """The stream of an item, and its number there."""
        streams = self.validation if place.number >= VALIDATION_START else self.training
        return streams[place.bucket], place.number

    def views(self) -> list[TrainingView]:
        """All possible views."""
        streams = (*self.training, *self.validation)
        return list(dict.fromkeys(view for s in streams if s is not None for view in s.views()))


class ItemBatches(Sampler[list[Index]]):
    """Endless micro-batches of one rank, from `start_step` on; subject items come before prior items.

    buckets: optimizer step -> its bucket, and how many of the steps before it were of that; None: there is
    one. All micro-batches and ranks of a step are of its bucket.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        prior_batch_size: int,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        buckets: Callable[[int], tuple[int, int]] | None = None,
    ):
        self.sizes: dict[StreamName, int] = {"subject": batch_size, "prior": prior_batch_size}
        self.accumulate, self.rank, self.world_size = accumulate, rank, world_size
        self.start_step = start_step
        self.buckets = buckets

    def __iter__(self) -> Iterator[list[Index]]:
        for micro_step in count(self.start_step * self.accumulate):
            slot = micro_step * self.world_size + self.rank
            if self.buckets is None:
                yield [(stream, slot * size + i) for stream, size in self.sizes.items() for i in range(size)]
                continue
            step, part = divmod(micro_step, self.accumulate)
            bucket, done = self.buckets(step)
            own = (done * self.accumulate + part) * self.world_size + self.rank  # slot among the bucket's
            yield [
                (stream, slot * size + i, Place(bucket, own * size + i))
                for stream, size in self.sizes.items()
                for i in range(size)
            ]


def read_source_images(
    folder: str | Path, *, captions: Callable[[Path], Captions], skip_unreadable: bool = False
) -> tuple[SourceImage, ...]:
    """The images of a folder with their captions, sorted by name."""
    paths = list_images(find_file(folder), skip_unreadable=skip_unreadable)
    return tuple(SourceImage(path, file_sha256(path), captions(path)) for path in paths)


@lru_cache(maxsize=4096)
def _upright_size(path: Path, sha256: str) -> tuple[int, int]:
    return upright_size(path)


@lru_cache(maxsize=1)  # large photos: one at a time
def _decoded(path: Path, sha256: str) -> Image.Image:
    """Decodes an image once for consecutive views; the result must not be modified."""
    return load_image(path)
