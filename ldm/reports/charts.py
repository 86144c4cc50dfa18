"""Charts of a page: curves over optimizer steps or trials, and the gauge of a metric; CSS colours them."""

from collections.abc import Mapping, Sequence

from ldm.reports import svg
from ldm.reports.curves import Curve, finite, smooth, thin

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 208, 56, 12, 10, 42
NAMES = 134  # room for the names of several curves, right of them
POINTS = 300  # of a line at most: more cannot be seen
DOTS = 12  # points up to which each is a dot
STEPS = "optimizer step"  # what the numbers below a chart are, unless it is told
COLOURS = 7  # that the CSS has for several curves


def chart(curve: Curve, *, label: str, along: str = STEPS, smoothed: bool = True) -> str:
    """One curve: its points faint, their running mean above. Empty if no value is a number.

    along: what the numbers below are. smoothed: without it there is no mean, and each point is a dot.
    """
    curve = finite(curve)
    if not curve:
        return ""
    window = len(curve) // 8 if smoothed else 1
    mean = smooth(curve, window=window) if window > 1 else curve
    axes = _Axes(mean, [*(v for _, v in mean), *_most(curve)])
    parts = [axes.line(curve, class_="raw")] if window > 1 else []
    parts.append(axes.line(mean, class_="smooth"))
    if len(curve) <= DOTS or not smoothed:
        parts += [svg.circle(axes.at(point), 3, class_="dot") for point in curve]
    return svg.inline([*axes.grid(along), *parts], WIDTH, HEIGHT, label=f"{label}, by {along}")


def together(
    curves: Mapping[str, Curve], *, mark: int | None, floors: Mapping[str, float], label: str
) -> str:
    """Several curves, each named at its end, and a vertical line at the step `mark`.

    floors: curve -> the value that it has by chance, a dashed line in its colour.
    """
    points = [point for curve in curves.values() for point in curve]
    axes = _Axes(points, [*(v for _, v in points), *floors.values(), 0.0], right=NAMES)
    parts = [] if mark is None else [axes.upright(mark)]
    names = _apart({name: axes.y(curve[-1][1]) for name, curve in curves.items()})
    for k, (name, curve) in enumerate(curves.items()):
        colour, right = k % COLOURS, WIDTH - NAMES
        if name in floors:
            height = axes.y(floors[name])
            parts.append(svg.line((LEFT, height), (right, height), class_=f"floor line-{colour}"))
        parts.append(axes.line(curve, class_=f"line line-{colour}"))
        parts += [svg.circle(axes.at(point), 2.5, class_=f"dot-{colour}") for point in curve]
        parts.append(svg.text((right + 8, names[name] + 4), name, class_=f"name-{colour}"))
    return svg.inline([*axes.grid(), *parts], WIDTH, HEIGHT, label=label)


def gauge(value: float, beside: float | None, *, scale: tuple[float, float]) -> str:
    """A bar from 0 to the value, and a tick at the value to compare it with."""
    low, high = scale

    def x(number: float) -> float:
        return 100 * (min(max(number, low), high) - low) / (high - low)

    def block(kind: str, left: float, right: float) -> str:
        return svg.rect((left, 0), right - left, 10, class_=kind)

    parts = [block("track", 0, 100), block("bar", *sorted((x(0), x(value))))]
    parts += [] if beside is None else [block("tick", x(beside) - 0.7, x(beside) + 0.7)]
    return svg.element("svg", *parts, viewBox="0 0 100 10", preserveAspectRatio="none", aria_hidden="true")


class _Axes:
    """Points -> pixels: steps from the first to the last, round numbers that enclose the values.

    0 is among the numbers where the values come near it; else the chart begins where they do.
    """

    def __init__(self, curve: Curve, values: Sequence[float], *, right: float = RIGHT):
        steps = [step for step, _ in curve]
        self.first = min(steps)
        self.last = max(max(steps), self.first + 1)
        self.right = right
        low, high = min(values), max(values)
        near_zero = [0.0] if 0 < low < high - low or low - high < high < 0 else []
        self.y = svg.Axis([low, high, *near_zero], HEIGHT - BOTTOM, TOP)
        inside = svg.ticks(self.first, self.last)
        self.steps = [step for step in inside if self.first <= step <= self.last and step == int(step)]

    def x(self, step: float) -> float:
        return LEFT + (WIDTH - LEFT - self.right) * (step - self.first) / (self.last - self.first)

    def at(self, point: tuple[int, float]) -> svg.Point:
        return self.x(point[0]), self.y(point[1])

    def line(self, curve: Curve, *, class_: str) -> str:
        return svg.polyline(map(self.at, thin(curve, most=POINTS)), class_=class_)

    def upright(self, step: int) -> str:
        return svg.line((self.x(step), TOP), (self.x(step), HEIGHT - BOTTOM), class_="mark")

    def grid(self, along: str = STEPS) -> list[str]:
        """Lines with numbers along the left, numbers below, and what the latter are: `along`."""
        parts, end, low = [], WIDTH - self.right, HEIGHT - BOTTOM
        for value in self.y.ticks:
            height = self.y(value)
            parts.append(svg.line((LEFT, height), (end, height), class_="axis"))
            parts.append(svg.text((LEFT - 6, height + 4), f"{value:g}", text_anchor="end"))
        for step in self.steps:
            parts.append(svg.text((self.x(step), low + 17), f"{step:g}", text_anchor="middle"))
        parts.append(svg.text(((LEFT + end) / 2, HEIGHT - 6), along, text_anchor="middle"))
        return parts


def _most(curve: Curve) -> tuple[float, float]:
    """The values between which all but the lowest and the highest 2 % lie: single peaks set no scale."""
    values = sorted(value for _, value in curve)
    cut = len(values) // 50
    return values[cut], values[-1 - cut]


def _apart(heights: Mapping[str, float], *, gap: float = 14) -> dict[str, float]:
    """The same heights, moved down where two labels would overlap, and up from below the frame."""
    placed: dict[str, float] = {}
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        placed[name] = max([height, *(other + gap for other in placed.values())])
    beyond = max(0.0, max(placed.values(), default=0.0) - (HEIGHT - BOTTOM))
    return {name: height - beyond for name, height in placed.items()}
