"""Curves of a run: read from TensorBoard's event files, plotted as SVG."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Curve = Sequence[tuple[int, float]]  # (optimizer step, value)

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 190, 52, 8, 10, 24


def read_curves(folder: Path) -> dict[str, Curve]:
    """The scalars of a TensorBoard folder, by name; if a resumed run logged a step again, the later value."""
    curves: dict[str, dict[int, float]] = {}
    for file in sorted(folder.glob("events.*"), key=lambda file: file.stat().st_mtime):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for name in events.Tags()["scalars"]:
            curves.setdefault(name, {}).update((e.step, e.value) for e in events.Scalars(name))
    return {name: sorted(points.items()) for name, points in curves.items()}


def smooth(curve: Curve, *, window: int) -> Curve:
    """Centred running mean: of each point and its neighbours within half a window."""
    half = window // 2
    spans = [(max(0, i - half), i + half + 1) for i in range(len(curve))]
    values = [value for _, value in curve]
    return [
        (step, sum(values[a:b]) / len(values[a:b])) for (step, _), (a, b) in zip(curve, spans, strict=True)
    ]


def chart(curve: Curve, *, label: str) -> str:
    """One curve as an <svg>: its points faint, their running mean above, round numbers along the axes."""
    curve = [(step, value) for step, value in curve if math.isfinite(value)]
    if not curve:
        return ""
    axes, window = _Axes([curve]), len(curve) // 8
    parts = [axes.line(curve, "raw"), axes.line(smooth(curve, window=window), "smooth")] if window > 1 else []
    return axes.svg(parts or [axes.line(curve, "smooth")], label=label)


def together(curves: Mapping[str, Curve], *, mark: int | None, label: str) -> str:
    """Several curves in one <svg>, each labelled at its end, with a vertical line at the step `mark`."""
    axes, parts = _Axes(list(curves.values()), right=112), []
    if mark is not None:
        parts.append(f'<line class="mark" x1="{axes.x(mark):.1f}" x2="{axes.x(mark):.1f}" {axes.height}/>')
    names = _apart({name: axes.y(curve[-1][1]) for name, curve in curves.items()})
    for k, (name, curve) in enumerate(curves.items()):
        parts.append(axes.line(curve, f"line line-{k}"))
        parts += [
            f'<circle class="dot-{k}" cx="{axes.x(s):.1f}" cy="{axes.y(v):.1f}" r="2.5"/>' for s, v in curve
        ]
        x = axes.x(curve[-1][0]) + 8
        parts.append(f'<text class="name-{k}" x="{x:.1f}" y="{names[name] + 4:.1f}">{escape(name)}</text>')
    return axes.svg(parts, label=label)


class _Axes:
    """Steps and values -> pixels, with round numbers along the left and below."""

    def __init__(self, curves: Sequence[Curve], *, right: float = RIGHT):
        steps = [step for curve in curves for step, _ in curve]
        values = [value for curve in curves for _, value in curve]
        self.x_ticks, self.right = ticks(0, max(*steps, 1)), right
        self.y_ticks = ticks(min(0.0, *values), max(0.0, *values) or 1.0)
        self.x_end = max(self.x_ticks[-1], *steps)
        self.height = f'y1="{TOP}" y2="{HEIGHT - BOTTOM}"'

    def x(self, step: float) -> float:
        return LEFT + (WIDTH - LEFT - self.right) * step / self.x_end

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    def line(self, points: Curve, kind: str) -> str:
        places = " ".join(f"{self.x(s):.1f},{self.y(v):.1f}" for s, v in points)
        return f'<polyline class="{kind}" points="{places}"/>'

    def svg(self, parts: Sequence[str], *, label: str) -> str:
        across = f'x1="{LEFT}" x2="{WIDTH - self.right}"'
        grid = [
            f'<line class="axis" {across} y1="{self.y(v):.1f}" y2="{self.y(v):.1f}"/>'
            f'<text x="{LEFT - 6}" y="{self.y(v) + 4:.1f}" text-anchor="end">{v:g}</text>'
            for v in self.y_ticks
        ]
        grid += [
            f'<text x="{self.x(s):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{s:g}</text>'
            for s in self.x_ticks[:-1]
        ]
        box = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}"'
        return f"<svg {box}>{''.join([*grid, *parts])}</svg>"


def _apart(heights: Mapping[str, float], *, gap: float = 13) -> dict[str, float]:
    """The same heights, moved down where two labels would overlap."""
    placed: dict[str, float] = {}
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        placed[name] = max([height, *(other + gap for other in placed.values())])
    return placed


def ticks(low: float, high: float, *, about: int = 4) -> list[float]:
    """Some `about` multiples of 1, 2 or 5 times a power of ten that enclose [low, high]; low < high."""
    raw = (high - low) / about
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]
