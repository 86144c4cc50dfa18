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


def cycle(weights: Sequence[Fraction]) -> list[int]:
    """The fewest items of each concept whose numbers have the ratio of the weights: 0.5, 1 -> 1, 2.

    Raises UserError for weights without a short cycle.
    """
    scale = reduce(lcm, (weight.denominator for weight in weights))
    counts = [int(weight * scale) for weight in weights]
    shared = reduce(gcd, counts)
    counts = [count // shared for count in counts]
    if sum(counts) > LONGEST_CYCLE:
        said = ", ".join(str(float(weight)) for weight in weights)
        what = f"The weights {said} come out even only after {sum(counts)} items"
        raise UserError(what, where="concepts", remedy="Choose round weights, such as 1, 2 or 0.5.")
    return counts


class Turns:
    """Which of several streams each item is of, and its number there: a function of (seed, item).

    In each cycle (`cycle`) every stream has as many items as its weight says, in a random order.
    """

    def __init__(self, weights: Sequence[Fraction], *, seed: int, purpose: str):
        self.counts = cycle(weights)
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

    empty_share: share of all items whose caption is empty, spread evenly (see `Stream.caption`).
    """

    def __init__(self, streams: Sequence[Stream], weights: Sequence[Fraction], *, empty_share: float = 0.0):
        self.streams = tuple(streams)
        self.size = streams[0].size
        self.empty_share = empty_share
        self.turns = Turns(weights, seed=streams[0].seed, purpose=f"{streams[0].name}/concept")

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
    name: StreamName, parts: Sequence[StreamPart], *, empty_share: float, **shown: Any
) -> ItemStream:
    """The stream of one part, or of several by turns; shown: how, the other fields of `Stream`."""

    def stream(part: StreamPart, **more: Any) -> Stream:
        held_out = {photo.path for photo in part.held_out}
        own = shown | ({"crop_variants": None, "flip": False} if part.generated else {})
        own["of_class"] = part.of_class
        images = tuple(image for image in part.images if image.path not in held_out)
        return Stream(name, images, held_out=tuple(part.held_out), **own, **more)

    if len(parts) == 1:
        return stream(parts[0], empty_share=empty_share)
    streams = [stream(part, label=f"/{part.name}") for part in parts]
    return MixedStream(streams, [part.weight for part in parts], empty_share=empty_share)
