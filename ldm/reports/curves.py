"""Curves of a run: read from TensorBoard's event files, made smooth and short enough to plot."""

import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Curve = Sequence[tuple[int, float]]  # (optimizer step, value)


def read_curves(folder: Path) -> dict[str, Curve]:
    """The scalars of a TensorBoard folder, by name; if a resumed run logged a step again, the later value."""
    curves: dict[str, dict[int, float]] = {}
    for file in sorted(folder.glob("events.*"), key=lambda file: file.stat().st_mtime):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for name in events.Tags()["scalars"]:
            curves.setdefault(name, {}).update((e.step, e.value) for e in events.Scalars(name))
    return {name: sorted(points.items()) for name, points in curves.items()}


def finite(curve: Curve) -> Curve:
    """The points that are numbers."""
    return [(step, value) for step, value in curve if math.isfinite(value)]


def is_flat(curve: Curve) -> bool:
    """Whether all values are the same, which needs no chart."""
    return len({value for _, value in curve}) == 1


def smooth(curve: Curve, *, window: int) -> Curve:
    """Centred running mean: of each point and its neighbours within half a window."""
    half, count = window // 2, len(curve)
    spans = [(max(0, i - half), min(count, i + half + 1)) for i in range(count)]
    sums = list(accumulate((value for _, value in curve), initial=0.0))
    return [(step, (sums[b] - sums[a]) / (b - a)) for (step, _), (a, b) in zip(curve, spans, strict=True)]


def thin(curve: Curve, *, most: int) -> Curve:
    """At most `most` points, or as given: of as many even parts of the curve the lowest and the highest."""
    if len(curve) <= most:
        return curve
    parts = most // 2
    bounds = [len(curve) * k // parts for k in range(parts + 1)]
    kept: list[tuple[int, float]] = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        part = curve[start:end]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept
