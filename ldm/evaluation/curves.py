"""Curves of a run: read from TensorBoard's files, drawn as SVG."""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Curve = Sequence[tuple[int, float]]  # (optimizer step, value)

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 190, 52, 8, 10, 24


def read_curves(folder: Path) -> dict[str, Curve]:
    """The scalars of a TensorBoard folder, by name; where a resumed run wrote a step again, the later one."""
    curves: dict[str, dict[int, float]] = {}
    for file in sorted(folder.glob("events.*"), key=lambda file: file.stat().st_mtime):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for name in events.Tags()["scalars"]:
            curves.setdefault(name, {}).update((e.step, e.value) for e in events.Scalars(name))
    return {name: sorted(points.items()) for name, points in curves.items()}


def smooth(curve: Curve, *, window: int) -> Curve:
    """The mean of each point and its neighbours within half a window."""
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
    steps, values = [s for s, _ in curve], [v for _, v in curve]
    x_ticks = ticks(0, max(*steps, 1))
    y_ticks = ticks(min(0.0, *values), max(0.0, *values) or 1.0)
    x_span, y_low, y_span = max(x_ticks[-1], *steps), y_ticks[0], y_ticks[-1] - y_ticks[0]

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / x_span

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - y_low) / y_span

    def line(points: Curve, kind: str) -> str:
        return f'<polyline class="{kind}" points="{" ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in points)}"/>'

    parts = [
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:g}</text>'
        for v in y_ticks
    ]
    parts += [
        f'<text x="{x(s):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{s:g}</text>' for s in x_ticks[:-1]
    ]
    window = len(curve) // 8
    parts += [line(curve, "raw"), line(smooth(curve, window=window), "smooth")] if window > 1 else []
    parts += [] if window > 1 else [line(curve, "smooth")]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def ticks(low: float, high: float, *, about: int = 4) -> list[float]:
    """Some `about` multiples of 1, 2 or 5 times a power of ten that enclose [low, high]; low < high."""
    raw = (high - low) / about
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]
