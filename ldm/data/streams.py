"""Streams of several concepts or classes: which of them an item is of follows from its number alone."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import reduce
from math import gcd, lcm
from typing import Any, NamedTuple

import torch

from ldm.data.items import (
    VALIDATION_START,
    ItemStream,
    SourceImage,
    Stream,
    StreamName,
    TrainingView,
    is_among_share,
)
from ldm.errors import UserError
from ldm.randomness import generator

LONGEST_CYCLE = 1000  # items after which the shares of the concepts are exact


class StreamPart(NamedTuple):
    """The images of one concept or class in a stream.

    held_out: those that only validate. generated: by the base, and so neither cropped nor mirrored. of_class:
    a caption of the subject -> one of its class.
    """

    name: str
    weight: Fraction
    images: Sequence[SourceImage]
    held_out: Sequence[SourceImage] = ()
    generated: bool = False
    of_class: Callable[[str], str] | None = None

    @property
    def trained(self) -> tuple[SourceImage, ...]:
        """Its images without those that only validate, and without copies of these."""
        held_out = {photo.sha256 for photo in self.held_out}
        return tuple(image for image in self.images if image.sha256 not in held_out)

    @property
    def validated(self) -> tuple[SourceImage, ...]:
        """The images of its validation items."""
        return tuple(self.held_out) or self.trained


def cycle(weights: Sequence[Fraction]) -> list[int]:
    """The fewest items of each concept whose numbers have the ratio of the weights: 0.5, 1 -> 1, 2.

    Raises UserError for weights without a short cycle.
    """
    counts = _whole(weights)
    if sum(counts) > LONGEST_CYCLE:
        said = ", ".join(str(float(weight)) for weight in weights)
        what = f"The weights {said} come out even only after {sum(counts)} items"
        raise UserError(what, where="concepts", remedy="Choose round weights, such as 1, 2 or 0.5.")
    return counts


def about_cycle(weights: Sequence[Fraction]) -> list[int]:
    """`cycle`, or where it is long its rounded shares of LONGEST_CYCLE items, each of at least one.

    For weights that numbers of photos make, which nobody can choose; a stream of weight 0 has no item.
    """
    counts = _whole(weights)
    total = sum(counts)
    if total <= LONGEST_CYCLE:
        return counts
    return [count and max(1, round(count * LONGEST_CYCLE / total)) for count in counts]


def _whole(weights: Sequence[Fraction]) -> list[int]:
    """The least whole numbers in the ratio of the weights."""
    scale = reduce(lcm, (weight.denominator for weight in weights))
    counts = [int(weight * scale) for weight in weights]
    shared = reduce(gcd, counts)
    return [count // shared for count in counts]


class Turns:
    """Which of several streams each item is of, and its number there: a function of (seed, item).

    counts: items of each stream in a cycle, where they have a random order.
    """

    def __init__(self, counts: Sequence[int], *, seed: int, purpose: str):
        self.counts = list(counts)
        self.whose = torch.repeat_interleave(torch.tensor(self.counts))  # stream of each place of a cycle
        self.seed = seed
        self.purpose = purpose

    def __call__(self, item: int) -> tuple[int, int]:
        """-> (stream, number of the item in it); validation items stay validation items."""
        first = VALIDATION_START if item >= VALIDATION_START else 0
        done, position = divmod(item - first, len(self.whose))
        draws = generator(self.seed, first + done, self.purpose)
        order = self.whose[torch.randperm(len(self.whose), generator=draws)]
        stream = int(order[position])
        before = int((order[:position] == stream).sum())
        return stream, first + done * self.counts[stream] + before


class MixedStream:
    """The items of several concepts' streams as one stream, by turns.

    empty_share: share of all items whose caption is empty, spread evenly (see `Stream.caption`). label: tells
    the turns of several buckets apart.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        weights: Sequence[Fraction],
        *,
        empty_share: float = 0.0,
        label: str = "",
    ):
        self.streams = tuple(streams)
        self.shape = streams[0].shape
        self.empty_share = empty_share
        purpose = f"{streams[0].name}/concept{label}"
        self.turns = Turns(about_cycle(weights), seed=streams[0].seed, purpose=purpose)

    def view(self, item: int) -> TrainingView:
        """The view of an item (see `Stream.view`)."""
        stream, number = self.turns(item)
        return self.streams[stream].view(number)

    def captions(self, item: int) -> dict[str, str]:
        """The captions of an item (see `Stream.captions`)."""
        if is_among_share(item, self.empty_share):
            return {"caption": "", "class_caption": ""}
        stream, number = self.turns(item)
        return self.streams[stream].captions(number)

    def views(self) -> list[TrainingView]:
        """All possible views."""
        return [view for stream in self.streams for view in stream.views()]


def stream_of(
    name: StreamName, parts: Sequence[StreamPart], *, empty_share: float, label: str = "", **shown: Any
) -> ItemStream:
    """The stream of one part, or of several by turns.

    label: tells the draws of several buckets apart. shown: how, the other fields of `Stream`.
    """

    def stream(part: StreamPart, **more: Any) -> Stream:
        own = shown | ({"crop_variants": None, "flip": False} if part.generated else {})
        own["of_class"] = part.of_class
        return Stream(name, part.trained, held_out=tuple(part.held_out), **own, **more)

    if len(parts) == 1:
        return stream(parts[0], empty_share=empty_share, label=label)
    streams = [stream(part, label=f"{label}/{part.name}") for part in parts]
    weights = [part.weight for part in parts]
    return MixedStream(streams, weights, empty_share=empty_share, label=label)
