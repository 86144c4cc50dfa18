"""Plots of a study: a row per variant with its runs, mean and interval, and one metric against another."""

from collections.abc import Sequence

from ldm.evaluation.statistics import Row, mean_of
from ldm.reports import svg

ACROSS = 3  # panels beside one another
PANEL, GAP, ROW, TOP, BOTTOM = 180, 42, 20, 34, 34
CHARACTER = 6.6  # pixels of one, at most in the mean of a name
WIDTH, HEIGHT, LEFT, RIGHT = 460, 270, 56, 14  # of the plot of two metrics
BELOW = 54  # its ticks and the name of its metric
COLORS = ("#3b7dd8", "#d8663b", "#3ba56b", "#9b59b6", "#c9a227", "#5d6d7e", "#c0392b", "#16a085")
RUN, GRID, STRIPE = "#9ab", "#dde", "#f6f7fb"


def panels(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """An SVG with a panel per metric, where every variant has a line: its runs, their mean, its interval."""
    variants = variants_of(rows)
    left = _width(variants)
    width = left + min(len(metrics), ACROSS) * (PANEL + GAP)
    parts, top = [], 0
    for first in range(0, len(metrics), ACROSS):
        inside = _lines(variants, width, left)
        for k, metric in enumerate(metrics[first : first + ACROSS]):
            panel = _panel(rows, metric, variants)
            inside.append(svg.element("g", *panel, transform=f"translate({left + k * (PANEL + GAP)} 0)"))
        parts.append(svg.element("g", *inside, transform=f"translate(0 {top})"))
        top += TOP + ROW * len(variants) + BOTTOM
    return svg.document(parts, width, top, label=panels_label(rows, metrics))


def frontier(rows: Sequence[Row], across: str, up: str) -> str:
    """An SVG of one metric against another: the variants' means, with crosses of intervals."""
    rows = [row for row in rows if None not in (row[across], row[up])]
    variants, bottom = variants_of(rows), HEIGHT - BELOW
    x = svg.Axis([row[across] for row in rows], LEFT, WIDTH - RIGHT)
    y = svg.Axis([row[up] for row in rows], bottom, TOP)
    parts = [_middle((WIDTH / 2, 18), frontier_label(across, up), font_weight="bold")]
    parts += [svg.line((LEFT, y(v)), (WIDTH - RIGHT, y(v)), stroke=GRID) for v in y.ticks]
    parts += [svg.text((LEFT - 6, y(v) + 4), f"{v:g}", text_anchor="end") for v in y.ticks]
    parts += [_middle((x(v), bottom + 18), f"{v:g}") for v in x.ticks]
    parts.append(_middle((WIDTH / 2, bottom + 40), spoken(across)))
    for k, variant in enumerate(variants):
        color, height = COLORS[k % len(COLORS)], TOP + 16 * k + 10
        a, b = mean_of(rows, variant, across), mean_of(rows, variant, up)
        center = x(a.mean), y(b.mean)
        if a.interval and b.interval:
            cross = {"stroke": color, "stroke_width": 2}
            parts.append(svg.line((x(a.interval.low), center[1]), (x(a.interval.high), center[1]), **cross))
            parts.append(svg.line((center[0], y(b.interval.low)), (center[0], y(b.interval.high)), **cross))
        parts += [_mark(center, k), _mark((WIDTH + 12, height - 4), k)]
        parts.append(svg.text((WIDTH + 22, height), variant))
    height = max(HEIGHT, TOP + 16 * len(variants) + 10)
    return svg.document(parts, WIDTH + 22 + _width(variants), height, label=frontier_label(across, up))


def panels_label(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """What `panels` shows, for those who do not see it."""
    shown = ", ".join(map(spoken, metrics))
    return f"{shown[:1].upper()}{shown[1:]}, of each variant: {'; '.join(variants_of(rows))}"


def frontier_label(across: str, up: str) -> str:
    return f"{spoken(up)} against {spoken(across)}"


def variants_of(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["variant"] for row in rows))


def spoken(metric: str) -> str:
    return metric.replace("_", " ")


def _lines(variants: Sequence[str], width: float, left: float) -> list[str]:
    """The names of the variants, each beside its line; every other line has a ground of its own."""
    parts = []
    for k, variant in enumerate(variants):
        y = TOP + ROW * k
        if k % 2 == 0:
            parts.append(svg.rect((0, y), width, ROW, fill=STRIPE))
        parts.append(svg.text((left - 12, y + ROW / 2 + 4), variant, text_anchor="end"))
    return parts


def _panel(rows: Sequence[Row], metric: str, variants: Sequence[str]) -> list[str]:
    """One metric; a variant that does not have it has an empty line."""
    rows = [row for row in rows if row[metric] is not None]
    x = svg.Axis([row[metric] for row in rows], 0, PANEL)
    bottom = TOP + ROW * len(variants)
    parts = [_middle((PANEL / 2, 22), spoken(metric), font_weight="bold")]
    for value in x.ticks:
        parts.append(svg.line((x(value), TOP), (x(value), bottom), stroke=GRID))
        parts.append(_middle((x(value), bottom + 16), f"{value:g}", font_size="11"))
    measured = set(variants_of(rows))
    for k, variant in enumerate(variants):
        if variant not in measured:
            continue
        y, found = TOP + ROW * (k + 0.5), mean_of(rows, variant, metric)
        for n, row in enumerate(row for row in rows if row["variant"] == variant):
            parts.append(svg.circle((x(row[metric]), y - 6 + 2 * (n % 7)), 1.8, fill=RUN))
        if found.interval:
            ends = ((x(value), y) for value in (found.interval.low, found.interval.high))
            parts.append(svg.line(*ends, stroke=COLORS[0], stroke_width=2))
        parts.append(svg.circle((x(found.mean), y), 4, fill=COLORS[0]))
    return parts


def _mark(center: svg.Point, k: int) -> str:
    """The mark of variant k: round, then square when the colours begin anew, then square on its corner."""
    color, shape = COLORS[k % len(COLORS)], k // len(COLORS)
    if shape == 0:
        return svg.circle(center, 4.5, fill=color)
    turned = {"transform": f"rotate({45 * (shape - 1)} {center[0]:.1f} {center[1]:.1f})"}
    return svg.rect((center[0] - 4, center[1] - 4), 8, 8, fill=color, **turned)


def _width(names: Sequence[str]) -> int:
    """Pixels of the longest of some names, with a margin."""
    return 24 + round(CHARACTER * max(map(len, names)))


def _middle(place: svg.Point, words: str, **attributes: str) -> str:
    return svg.text(place, words, text_anchor="middle", **attributes)
