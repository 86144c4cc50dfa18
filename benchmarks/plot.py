"""Bars in SVG: what was measured, in groups of one case each."""

from collections.abc import Mapping, Sequence

from ldm.reports import svg

BAR, GAP, LABEL, LENGTH = 20, 14, 430, 420  # pixels: a bar, between groups, the names' width, the longest bar
COLOURS = ("#9aa7b8", "#3b7dd8", "#2b9e6b", "#c9762c")


def plot(groups: Mapping[str, Mapping[str, float]], title: str, *, line: float | None = None) -> str:
    """Case -> series -> value, as horizontal bars; a dashed line at `line`, such as equal speed."""
    series = list(dict.fromkeys(name for values in groups.values() for name in values))
    longest = max([line or 0, 1e-9, *(value for values in groups.values() for value in values.values())])
    scale = LENGTH / longest
    parts, y = [svg.text((10, 22), title, font_weight="bold")], 36
    parts += _legend(series, y)
    y = top = y + (BAR + GAP if len(series) > 1 else 0)
    for case, values in groups.items():
        parts.append(svg.text((10, y + 15), case))
        for name, value in values.items():
            length, colour = scale * value, COLOURS[series.index(name) % len(COLOURS)]
            parts.append(svg.rect((LABEL, y), length, BAR - 2, fill=colour))
            parts.append(svg.text((LABEL + length + 6, y + 14), f"{value:,.2f}"))
            y += BAR
        y += GAP
    if line is not None:
        x = LABEL + scale * line
        parts.append(svg.line((x, top), (x, y), stroke="black", stroke_dasharray=4))
    return svg.document(parts, LABEL + LENGTH + 80, y + 10, label=title)


def _legend(series: Sequence[str], y: int) -> list[str]:
    if len(series) < 2:
        return []
    parts, x = [], 10
    for name, colour in zip(series, COLOURS * len(series), strict=False):
        parts.append(svg.rect((x, y), 14, 14, fill=colour))
        parts.append(svg.text((x + 20, y + 12), name))
        x += 40 + 8 * len(name)
    return parts
