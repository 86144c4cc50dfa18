"""Bars in SVG: what was measured, in groups of one case each."""

from collections.abc import Mapping, Sequence
from html import escape

BAR, GAP, LABEL, LENGTH = 20, 14, 430, 420  # pixels: a bar, between groups, the names' width, the longest bar
COLOURS = ("#9aa7b8", "#3b7dd8", "#2b9e6b", "#c9762c")


def plot(
    groups: Mapping[str, Mapping[str, float]], title: str, *, line: float | None = None, digits: int = 2
) -> str:
    """Case -> series -> value, as horizontal bars; a dashed line at `line`, such as equal speed."""
    series = list(dict.fromkeys(name for values in groups.values() for name in values))
    longest = max([line or 0, 1e-9, *(value for values in groups.values() for value in values.values())])
    scale = LENGTH / longest
    lines, y = [f'<text x="10" y="22" font-weight="bold">{escape(title)}</text>'], 36
    lines += _legend(series, y)
    y = top = y + (BAR + GAP if len(series) > 1 else 0)
    for case, values in groups.items():
        lines.append(f'<text x="10" y="{y + 15}">{escape(case)}</text>')
        for name, value in values.items():
            length, colour = round(scale * value, 1), COLOURS[series.index(name) % len(COLOURS)]
            lines.append(f'<rect x="{LABEL}" y="{y}" width="{length}" height="{BAR - 2}" fill="{colour}"/>')
            lines.append(f'<text x="{LABEL + length + 6}" y="{y + 14}">{value:,.{digits}f}</text>')
            y += BAR
        y += GAP
    if line is not None:
        x = round(LABEL + scale * line, 1)
        lines.append(f'<line x1="{x}" y1="{top}" x2="{x}" y2="{y}" stroke="black" stroke-dasharray="4"/>')
    width, height = LABEL + LENGTH + 80, y + 10
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="13">'
    )
    return (
        "\n".join([head, f'<rect width="{width}" height="{height}" fill="white"/>', *lines, "</svg>"]) + "\n"
    )


def _legend(series: Sequence[str], y: int) -> list[str]:
    if len(series) < 2:
        return []
    lines, x = [], 10
    for name, colour in zip(series, COLOURS * len(series), strict=False):
        lines.append(f'<rect x="{x}" y="{y}" width="14" height="14" fill="{colour}"/>')
        lines.append(f'<text x="{x + 20}" y="{y + 12}">{escape(name)}</text>')
        x += 40 + 8 * len(name)
    return lines
