"""Aspect-ratio buckets: shapes of about one area, of which each photo has the one nearest to its own.

Stable Diffusion XL was trained so (Podell et al. 2023, sec. 2.3), from 512 x 2048 to 2048 x 512 pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import log
from typing import NamedTuple

from ldm.annotations import PositiveInt
from ldm.errors import UserError


class Shape(NamedTuple):
    """Of an image that is trained on or sampled, in pixels."""

    height: int
    width: int

    @classmethod
    def square(cls, side: int) -> "Shape":
        return cls(side, side)

    @property
    def area(self) -> int:
        return self.height * self.width

    @property
    def is_square(self) -> bool:
        return self.height == self.width

    def __str__(self) -> str:
        return f"{self.height} x {self.width}"


@dataclass(frozen=True)
class Buckets:
    """Which shapes there are besides the square of `size`, so that photos keep theirs and little is cropped.

    For each side there is the longest other side with which the area is at most that of the square.

    Args:
        unit: pixels; sides are multiples of it. None: the family's, 64, or of smaller networks the least that
            they take.
        min_side, max_side: pixels of the shortest and of the longest side; None: half of `size`, and twice
            `size`.
    """

    unit: PositiveInt | None = None
    min_side: PositiveInt | None = None
    max_side: PositiveInt | None = None

    def shapes(self, size: int, *, unit: int) -> tuple[Shape, ...]:
        """All shapes for squares of `size` pixels a side, the widest first, in multiples of `unit`.

        Raises UserError for settings without the square or without another shape.
        """
        least, most = self.min_side or -(-size // 2), self.max_side or 2 * size
        if size % unit:
            remedy = f"Set size to {max(1, round(size / unit)) * unit}, or another multiple of the unit."
            what = f"size {size} is no multiple of the buckets' unit of {unit} pixels"
            raise UserError(what, where="buckets.unit", remedy=remedy)
        for key, side, wrong in (("min_side", least, least > size), ("max_side", most, most < size)):
            if wrong:
                what = f"{key} {side} leaves the square of {size} pixels out"
                raise UserError(what, where=f"buckets.{key}", remedy="Set min_side <= size <= max_side.")
        most = min(most, size**2 // least)  # none is longer beside the shortest
        sides = range(-(-least // unit) * unit, most + 1, unit)
        widest = {Shape(side, size**2 // side // unit * unit) for side in sides}
        found = {shape for shape in widest if shape.width in sides}
        found |= {Shape(shape.width, shape.height) for shape in found}
        if len(found) == 1:
            what = f"Sides from {least} to {most} in multiples of {unit} pixels leave only the square"
            raise UserError(what, where="buckets", remedy="Choose a smaller unit, or take buckets off.")
        return tuple(sorted(found, key=lambda shape: (shape.height / shape.width, shape)))


def shapes_of(buckets: Buckets | None, size: int, *, unit: int | None) -> tuple[Shape, ...]:
    """The shapes that photos can be trained at; without buckets the square of `size` pixels a side."""
    if buckets is None:
        return (Shape.square(size),)
    if unit is None:
        raise ValueError("buckets without a unit need that of the networks: data.unit = 64")
    return buckets.shapes(size, unit=unit)


@lru_cache(maxsize=4096)
def nearest(shapes: tuple[Shape, ...], height: int, width: int) -> Shape:
    """The shape whose aspect ratio is nearest to that of an image, as a factor; of equals the largest."""

    def distance(shape: Shape) -> float:
        return abs(log(shape.width * height / (shape.height * width)))

    return min(shapes, key=lambda shape: (distance(shape), -shape.area, shape))


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers that add up to `total` in the ratio of weights, each at least 1 (largest remainders).

    total: at least as many as there are weights.
    """
    exact = [total * weight / sum(weights) for weight in weights]
    found = [max(1, int(part)) for part in exact]
    while sum(found) != total:
        step = 1 if sum(found) < total else -1
        open_ones = [k for k, n in enumerate(found) if step > 0 or n > 1]
        found[max(open_ones, key=lambda k: step * (exact[k] - found[k]))] += step
    return found
