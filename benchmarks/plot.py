"""Ratios as a bar chart in SVG."""

from collections.abc import Sequence
from html import escape

ROW, LABEL, SCALE = 34, 430, 110  # pixels: of a row, of its name, of a ratio of 1


def plot(results: Sequence[dict], title: str) -> str:
    """How many times as fast as diffusers each case runs; the line is equal speed."""
    longest = max([1.0, *(result["speed_ratio"] for result in results)])
    width, height = LABEL + int(SCALE * longest) + 60, ROW * (len(results) + 2)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="10" y="22" font-weight="bold">{escape(title)}</text>',
    ]
    for k, result in enumerate(results, start=1):
        y, length = ROW * k + 6, int(SCALE * result["speed_ratio"])
        lines.append(f'<text x="10" y="{y + 16}">{escape(result["case"])}</text>')
        lines.append(f'<rect x="{LABEL}" y="{y}" width="{length}" height="22" fill="#3b7dd8"/>')
        lines.append(f'<text x="{LABEL + length + 6}" y="{y + 16}">{result["speed_ratio"]:.2f}</text>')
    x, bottom = LABEL + SCALE, ROW * (len(results) + 1) + 6
    lines.append(f'<line x1="{x}" y1="{ROW}" x2="{x}" y2="{bottom}" stroke="black" stroke-dasharray="4"/>')
    return "\n".join([*lines, "</svg>"]) + "\n"
