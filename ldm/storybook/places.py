"""Backgrounds of the eight storybook places, with a horizon near y = 40."""

import random
from collections.abc import Callable

from ldm.storybook.brush import RGB, Brush

Place = Callable[[Brush, random.Random], None]


def beach(brush: Brush, rng: random.Random) -> None:
    horizon = _ground(brush, rng, sky=(150, 216, 244), ground=(244, 220, 160))
    brush.rect(-1, horizon - 10, 65, horizon + 2, (46, 140, 200), ink=False)
    _disc(brush, rng, (255, 232, 110))


def snow(brush: Brush, rng: random.Random) -> None:
    horizon = _ground(brush, rng, sky=(184, 204, 222), ground=(246, 249, 252))
    for x in (rng.uniform(2, 10), rng.uniform(54, 62)):
        brush.polygon(
            [(x - 9, horizon + 1), (x, horizon - 16), (x + 9, horizon + 1)], (96, 132, 138), ink=False
        )
        brush.polygon(
            [(x - 4.5, horizon - 8), (x, horizon - 16), (x + 4.5, horizon - 8)], (246, 249, 252), ink=False
        )
    _dots(brush, rng, 9, 1.2, (255, 255, 255))


def moon(brush: Brush, rng: random.Random) -> None:
    horizon = _ground(brush, rng, sky=(18, 16, 26), ground=(168, 168, 174))
    for x in (rng.uniform(3, 14), rng.uniform(50, 61)):
        brush.ellipse(x, horizon + rng.uniform(6, 16), 6, 2.6, (126, 126, 134), ink=False)
    x, y = _corner(rng)
    brush.ellipse(x, y, 6.5, 6.5, (64, 130, 214), ink=False)
    brush.ellipse(x - 1.5, y - 1, 3, 2.4, (92, 176, 96), ink=False)
    _dots(brush, rng, 6, 0.8, (240, 240, 250))


def forest(brush: Brush, rng: random.Random) -> None:
    horizon = _ground(brush, rng, sky=(150, 192, 150), ground=(78, 112, 58))
    for x in (rng.uniform(0, 5), rng.uniform(11, 17), rng.uniform(47, 53), rng.uniform(59, 64)):
        brush.rect(x - 1.8, horizon - 8, x + 1.8, horizon + 6, (104, 72, 46), ink=False)
        brush.polygon(
            [(x - 8, horizon - 4), (x, horizon - 36), (x + 8, horizon - 4)], (34, 92, 56), ink=False
        )


def city(brush: Brush, rng: random.Random) -> None:
    horizon = _ground(brush, rng, sky=(200, 200, 214), ground=(106, 106, 116))
    for x in (0, 9, 46, 55):
        top = horizon - rng.uniform(18, 34)
        brush.rect(x, top, x + 9, horizon + 1, rng.choice(((120, 128, 150), (146, 124, 128))), ink=False)
        for y in range(int(top) + 3, int(horizon) - 3, 6):
            brush.rect(x + 2, y, x + 7, y + 2.4, (250, 230, 150), ink=False)
    brush.line([(-1, 57), (65, 57)], (236, 230, 214), 1.6)


def desert(brush: Brush, rng: random.Random) -> None:
    horizon = _ground(brush, rng, sky=(252, 196, 132), ground=(226, 158, 86))
    brush.ellipse(rng.uniform(-6, 8), horizon + 4, 24, 9, (238, 176, 104), ink=False)
    x = rng.choice((rng.uniform(5, 9), rng.uniform(55, 59)))
    brush.line([(x, horizon + 8), (x, horizon - 16)], (58, 128, 74), 4.4)
    brush.line([(x - 6, horizon - 10), (x - 6, horizon - 4), (x, horizon - 4)], (58, 128, 74), 3)
    brush.line([(x, horizon - 1), (x + 5, horizon - 1), (x + 5, horizon - 8)], (58, 128, 74), 3)
    _disc(brush, rng, (255, 244, 200))


def grass(brush: Brush, rng: random.Random) -> None:
    _ground(brush, rng, sky=(128, 196, 250), ground=(124, 206, 84))
    for x in (rng.uniform(4, 14), rng.uniform(48, 58)):
        y = rng.uniform(6, 16)
        brush.ellipse(x, y, 7, 3.4, (255, 255, 255), ink=False)
        brush.ellipse(x + 3, y - 2.4, 4, 3.2, (255, 255, 255), ink=False)
    for x in (4, 12, 52, 60):
        brush.ellipse(x + rng.uniform(-2, 2), rng.uniform(47, 60), 1.7, 1.7, (255, 150, 190), ink=False)


def night(brush: Brush, rng: random.Random) -> None:
    horizon = _ground(brush, rng, sky=(30, 40, 100), ground=(34, 62, 72))
    brush.ellipse(rng.uniform(4, 20), horizon + 5, 26, 12, (28, 52, 66), ink=False)
    x, y = _corner(rng)
    brush.ellipse(x, y, 6.5, 6.5, (252, 244, 190), ink=False)
    brush.ellipse(x + 3, y - 2, 5.6, 5.6, (30, 40, 100), ink=False)
    _dots(brush, rng, 6, 1.0, (255, 250, 210))


PLACES: dict[str, Place] = {
    "beach": beach,
    "snow": snow,
    "moon": moon,
    "forest": forest,
    "city": city,
    "desert": desert,
    "grass": grass,
    "night": night,
}
SHADOWS: dict[str, RGB] = {  # colour of the figure's shadow
    "beach": (206, 180, 120),
    "snow": (206, 214, 224),
    "moon": (124, 124, 132),
    "forest": (54, 82, 40),
    "city": (78, 78, 88),
    "desert": (190, 126, 62),
    "grass": (88, 164, 56),
    "night": (22, 42, 52),
}


def _ground(brush: Brush, rng: random.Random, *, sky: RGB, ground: RGB) -> float:
    """Draws sky and ground -> y of the horizon."""
    horizon = rng.uniform(37, 43)
    brush.rect(-1, -1, 65, 65, sky, ink=False)
    brush.rect(-1, horizon, 65, 65, ground, ink=False)
    return horizon


def _corner(rng: random.Random) -> tuple[float, float]:
    return rng.choice((rng.uniform(7, 10), rng.uniform(54, 57))), rng.uniform(7, 10)


def _disc(brush: Brush, rng: random.Random, color: RGB) -> None:
    x, y = _corner(rng)
    brush.ellipse(x, y, 5.5, 5.5, color, ink=False)


def _dots(brush: Brush, rng: random.Random, count: int, radius: float, color: RGB) -> None:
    for _ in range(count):
        brush.ellipse(rng.uniform(2, 62), rng.uniform(2, 34), radius, radius, color, ink=False)
