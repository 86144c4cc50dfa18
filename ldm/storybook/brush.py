"""Drawing primitives of the storybook: outlined shapes on a 64 x 64 canvas, supersampled 4 times."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageDraw

RGB = tuple[int, int, int]
Fill = RGB | int  # an int on a mask
Point = tuple[float, float]

SCALE = 4  # pixels per unit of the canvas
INK: RGB = (44, 34, 52)
SPOTS = ((-7, -6), (6, -7), (0, 1), (-9, 5), (9, 4), (-2, -13), (-16, -2), (16, -4), (0, 10))


@dataclass(frozen=True)
class Look:
    """Appearance of a figure: the attributes of an individual, with colours as RGB."""

    color: RGB
    accent: RGB
    pattern: str
    detail: str
    band: RGB | None


class Brush:
    """Draws on one image, with zoom, shift and mirroring. `ink=False` draws a shape without its outline."""

    def __init__(
        self, image: Image.Image, *, zoom: float = 1.0, dx: float = 0.0, dy: float = 0.0, mirror: bool = False
    ):
        self.image, self.pen = image, ImageDraw.Draw(image)
        self.zoom, self.dx, self.dy, self.mirror = zoom, dx, dy, mirror
        self.ink: Fill = INK if image.mode == "RGB" else 0

    @classmethod
    def on_new_page(cls) -> "Brush":
        return cls(Image.new("RGB", (64 * SCALE, 64 * SCALE)))

    def moved(self, *, zoom: float, dx: float, dy: float, mirror: bool) -> "Brush":
        return Brush(self.image, zoom=zoom, dx=dx, dy=dy, mirror=mirror)

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Fill, *, ink: bool = True) -> None:
        box = self._box(x - rx, y - ry, x + rx, y + ry)
        self.pen.ellipse(
            box, fill=fill, outline=self.ink if ink else None, width=self._width(1.1) if ink else 0
        )

    def rect(
        self, x0: float, y0: float, x1: float, y1: float, fill: Fill, *, radius: float = 0, ink: bool = True
    ) -> None:
        self.pen.rounded_rectangle(
            self._box(x0, y0, x1, y1),
            radius * self.zoom * SCALE,
            fill=fill,
            outline=self.ink if ink else None,
            width=self._width(1.1) if ink else 0,
        )

    def polygon(self, points: Sequence[Point], fill: Fill, *, ink: bool = True) -> None:
        corners = [self._xy(*p) for p in points]
        self.pen.polygon(corners, fill=fill)
        if ink:
            self.pen.line([*corners, *corners[:2]], fill=self.ink, width=self._width(1.1), joint="curve")

    def line(self, points: Sequence[Point], fill: Fill, width: float) -> None:
        self.pen.line([self._xy(*p) for p in points], fill=fill, width=self._width(width), joint="curve")

    def patterned(self, shape: Callable[["Brush", Fill], None], look: Look, center: Point) -> None:
        """Fills `shape` with the main colour, and with spots or stripes of the accent colour inside it."""
        shape(self, look.color)
        if look.pattern == "plain":
            return
        inside, marks = self._mask(), self._mask()
        shape(inside, 255)
        x, y = center
        if look.pattern == "spotted":
            for dx, dy in SPOTS:
                marks.ellipse(x + dx, y + dy, 3, 3, 255, ink=False)
        else:
            for dx in range(-28, 29, 8):
                marks.line([(x + dx - 4, y - 22), (x + dx + 4, y + 22)], 255, 3.4)
        self.image.paste(look.accent, mask=ImageChops.multiply(inside.image, marks.image))

    def _mask(self) -> "Brush":
        page = Image.new("L", self.image.size)
        return Brush(page, zoom=self.zoom, dx=self.dx, dy=self.dy, mirror=self.mirror)

    def _xy(self, x: float, y: float) -> Point:
        x = 64 - x if self.mirror else x
        return (x * self.zoom + self.dx) * SCALE, (y * self.zoom + self.dy) * SCALE

    def _box(self, x0: float, y0: float, x1: float, y1: float) -> list[float]:
        (a, b), (c, d) = self._xy(x0, y0), self._xy(x1, y1)
        return [min(a, c), min(b, d), max(a, c), max(b, d)]

    def _width(self, units: float) -> int:
        return max(1, round(units * self.zoom * SCALE))
