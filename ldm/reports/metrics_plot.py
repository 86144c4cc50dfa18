"""The metrics of one evaluation as an SVG: a row each, with its interval, the base's and the photos'."""

from collections.abc import Iterator, Mapping
from typing import Any

from ldm.reports import svg

WIDTH, LEFT, RIGHT, ROW = 640, 190, 70, 34
MEASURED, INTERVAL, GRID = "#2f6f5e", "#9fc3b8", "#dde"
KINDS = {"base": "#c76b29", "ceiling": "#5d6d7e", "noise_floor": "#9b59b6"}
NAMES = {"base": "untouched base", "ceiling": "photos", "noise_floor": "noise floor"}


def metrics_plot(metrics: Mapping[str, Any]) -> str:
    """`metrics.json` of an evaluation -> SVG; all metrics share one axis, which includes 0 and 1."""
    rows = {name: value for name, value in metrics.items() if isinstance(value, float)}
    intervals = metrics.get("intervals", {})
    beside = {kind: metrics.get(kind, {}) for kind in KINDS}
    numbers = [*rows.values(), *(n for i in intervals.values() for n in i), 0.0, 1.0]
    numbers += [n for known in beside.values() for name, n in known.items() if name in rows]
    x, height = svg.Axis(numbers, LEFT, WIDTH - RIGHT), ROW * (len(rows) + 1)
    parts = [svg.line((x(v), 4), (x(v), height - ROW), stroke=GRID) for v in (0, 1)]
    for k, (name, value) in enumerate(rows.items()):
        own = {kind: known[name] for kind, known in beside.items() if name in known}
        parts += _row(name, value, intervals.get(name), own, x=x, y=ROW * (k + 0.5))
    key = {MEASURED: "measured, with 95 % interval" if intervals else "measured"}
    key |= {KINDS[kind]: NAMES[kind] for kind in KINDS if beside[kind]}
    for k, (color, name) in enumerate(key.items()):
        left = 20 + 160 * k + 50 * (k > 0)
        parts.append(svg.rect((left, height - 19), 9, 9, fill=color))
        parts.append(svg.text((left + 14, height - 10), name))
    return svg.document(parts, WIDTH, height, label="Metrics beside those of the base and of the photos")


def _row(
    name: str,
    value: float,
    interval: tuple[float, float] | None,
    beside: Mapping[str, float],
    *,
    x: svg.Axis,
    y: float,
) -> Iterator[str]:
    thick = {"stroke_linecap": "round", "stroke_width": 6}
    yield svg.text((LEFT - 12, y + 4), name.replace("_", " "), text_anchor="end")
    if interval:
        yield svg.line((x(interval[0]), y), (x(interval[1]), y), stroke=INTERVAL, **thick)
    for kind, number in beside.items():
        yield svg.line((x(number), y - 9), (x(number), y + 9), stroke=KINDS[kind], stroke_width=2.5)
    yield svg.circle((x(value), y), 5, fill=MEASURED)
    yield svg.text((WIDTH - 10, y + 4), f"{value:.3f}", text_anchor="end")
