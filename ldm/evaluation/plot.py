"""The metrics of one evaluation as an SVG: a row each, with its interval, the base's and the photos'."""

from collections.abc import Mapping
from html import escape
from typing import Any

WIDTH, LEFT, RIGHT, ROW = 640, 190, 70, 34
KINDS = {"base": "#c76b29", "ceiling": "#5d6d7e", "noise_floor": "#9b59b6"}
NAMES = {"base": "untouched base", "ceiling": "photos", "noise_floor": "noise floor"}


def metrics_plot(metrics: Mapping[str, Any]) -> str:
    """`metrics.json` of an evaluation -> SVG; all metrics share one axis, which includes 0 and 1."""
    rows = {name: value for name, value in metrics.items() if isinstance(value, float)}
    intervals = metrics.get("intervals", {})
    beside = {kind: metrics.get(kind, {}) for kind in KINDS}
    numbers = [*rows.values(), *(n for i in intervals.values() for n in i), 0.0, 1.0]
    numbers += [n for known in beside.values() for name, n in known.items() if name in rows]
    low, high = min(numbers), max(numbers)

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / (high - low)

    height = ROW * (len(rows) + 1)
    parts = [
        f'<line x1="{x(v):.1f}" x2="{x(v):.1f}" y1="4" y2="{height - ROW}" stroke="#dde"/>' for v in (0, 1)
    ]
    for k, (name, value) in enumerate(rows.items()):
        y = ROW * (k + 0.5)
        parts.append(_text(LEFT - 12, y + 4, name.replace("_", " "), anchor="end"))
        if name in intervals:
            a, b = intervals[name]
            parts.append(_line(x(a), y, x(b), y, "#9fc3b8", 6))
        for kind, color in KINDS.items():
            if name in beside[kind]:
                at = x(beside[kind][name])
                parts.append(_line(at, y - 9, at, y + 9, color, 2.5))
        parts.append(f'<circle cx="{x(value):.1f}" cy="{y}" r="5" fill="#2f6f5e"/>')
        parts.append(_text(WIDTH - 10, y + 4, f"{value:.3f}", anchor="end"))
    key = {"#2f6f5e": "measured, with 95 % interval"} | {
        KINDS[kind]: NAMES[kind] for kind in KINDS if beside[kind]
    }
    for k, (color, name) in enumerate(key.items()):
        parts.append(_text(20 + 160 * k + 50 * (k > 0), height - 10, f"■ {name}", color=color))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'font-family="sans-serif" font-size="13"><rect width="{WIDTH}" height="{height}" fill="white"/>'
        + "".join(parts)
        + "</svg>\n"
    )


def _line(x1: float, y1: float, x2: float, y2: float, color: str, width: float) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{color}" stroke-width="{width}" stroke-linecap="round"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", color: str = "#22262e") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{escape(text)}</text>'
