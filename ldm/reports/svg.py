"""SVG as text: elements with their text escaped, axes with round numbers, a whole picture."""

import math
from collections.abc import Iterable, Sequence
from html import escape

Point = tuple[float, float]


def element(tag: str, *inside: str, **attributes: str | float) -> str:
    """An element around others; `text_anchor` is the attribute text-anchor, `class_` is class."""
    given = "".join(f' {_name(name)}="{_value(value)}"' for name, value in attributes.items())
    return f"<{tag}{given}>{''.join(inside)}</{tag}>" if inside else f"<{tag}{given}/>"


def line(start: Point, end: Point, **attributes: str | float) -> str:
    return element("line", x1=start[0], y1=start[1], x2=end[0], y2=end[1], **attributes)


def circle(center: Point, radius: float, **attributes: str | float) -> str:
    return element("circle", cx=center[0], cy=center[1], r=radius, **attributes)


def rect(corner: Point, width: float, height: float, **attributes: str | float) -> str:
    return element("rect", x=corner[0], y=corner[1], width=width, height=height, **attributes)


def polyline(points: Iterable[Point], **attributes: str | float) -> str:
    return element("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), **attributes)


def text(place: Point, words: str, **attributes: str | float) -> str:
    """Words whose baseline begins at a place; text_anchor="middle" or "end" aligns them otherwise."""
    return element("text", escape(words), x=place[0], y=place[1], **attributes)


def inline(parts: Iterable[str], width: float, height: float, *, label: str) -> str:
    """A picture inside an HTML page, whose CSS gives size, fonts and colours. label: its text alternative."""
    return element("svg", *parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=label)


def document(parts: Iterable[str], width: float, height: float, *, label: str) -> str:
    """A file of its own, on white, an element a line. label: its text alternative."""
    size = {"viewBox": f"0 0 {_value(width)} {_value(height)}", "width": width, "height": height}
    about = {"role": "img", "aria_label": label, "font_family": "sans-serif", "font_size": 12}
    lines = ["", rect((0, 0), width, height, fill="white"), *parts, ""]
    return element("svg", "\n".join(lines), xmlns="http://www.w3.org/2000/svg", **size, **about) + "\n"


class Axis:
    """Values -> pixels between `first` and `last`, with round numbers at the ends."""

    def __init__(self, values: Sequence[float], first: float, last: float):
        low, high = min(values), max(values)
        self.ticks = ticks(low, high) if high > low else ticks(*_around(low))
        self.first = first
        self.last = last

    def __call__(self, value: float) -> float:
        """The place of a value; one beyond the ends is put at the nearer end."""
        share = (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
        return self.first + (self.last - self.first) * min(max(share, 0.0), 1.0)


def ticks(low: float, high: float, *, about: int = 4) -> list[float]:
    """Some `about` multiples of 1, 2 or 5 times a power of ten that enclose [low, high]; low < high."""
    raw = (high - low) / about
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def _around(value: float) -> tuple[float, float]:
    """A range around a value that is alone."""
    reach = abs(value) / 2 or 0.5
    return value - reach, value + reach


def _name(name: str) -> str:
    return name.rstrip("_").replace("_", "-")


def _value(value: str | float) -> str:
    return escape(value) if isinstance(value, str) else f"{round(value, 1):g}"
