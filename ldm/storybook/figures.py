"""The figures of the six storybook classes, centred at x = 32 and standing on y = 61."""

from collections.abc import Callable

from ldm.storybook.brush import INK, RGB, Brush, Look

CREAM: RGB = (255, 236, 208)
PINK: RGB = (242, 130, 150)
GOLD: RGB = (250, 200, 60)
GLASS: RGB = (188, 226, 242)
LEAF: RGB = (150, 214, 96)


def dog(brush: Brush, look: Look) -> None:
    brush.line([(43, 52), (51, 47), (53, 41)], INK, 6.2)
    brush.line([(43, 52), (51, 47), (53, 42)], look.color, 4.0)
    brush.patterned(lambda b, fill: b.ellipse(32, 50, 13.5, 12, fill), look, (32, 51))
    for x in (24, 40):
        brush.ellipse(x, 59.5, 5, 3.2, look.accent)
    _collar(brush, look)
    brush.patterned(lambda b, fill: b.ellipse(32, 25, 14.5, 13, fill), look, (32, 22))
    _ears(brush, look)
    brush.ellipse(32, 33.5, 3, 4, PINK)
    brush.ellipse(32, 30, 8, 5.6, CREAM)
    brush.ellipse(32, 27.5, 3.2, 2.3, INK)
    for x in (25.5, 38.5):
        brush.ellipse(x, 21.5, 2.6, 2.9, INK, ink=False)
        brush.ellipse(x + 0.8, 20.5, 0.9, 0.9, (255, 255, 255), ink=False)


def cat(brush: Brush, look: Look) -> None:
    tail = [(42, 57), (52, 55), (55, 47), (51, 40), (53, 34)]
    brush.line(tail, INK, 5.8)
    brush.line(tail[:4], look.color, 3.6)
    brush.line(tail[3:], look.accent, 3.6)
    brush.patterned(lambda b, fill: b.ellipse(32, 50, 11.5, 12, fill), look, (32, 51))
    for x in (26, 38):
        brush.ellipse(x, 59.5, 4.4, 3, look.accent)
    _collar(brush, look)
    _ears(brush, look)
    brush.patterned(lambda b, fill: b.ellipse(32, 26, 16, 11.5, fill), look, (32, 19))
    for side in (-1, 1):
        x = 32 + 7 * side
        brush.ellipse(x, 25, 3.9, 4.1, LEAF)
        brush.ellipse(x, 25, 1.3, 3.2, INK, ink=False)
        for dy in (-1.2, 1.8):
            brush.line([(32 + 6 * side, 31 + dy / 2), (32 + 19 * side, 30.5 + 2 * dy)], INK, 0.9)
    brush.polygon([(29.6, 29.4), (34.4, 29.4), (32, 32.4)], PINK)


def bird(brush: Brush, look: Look) -> None:
    for x in (28, 35):
        brush.line([(x, 52), (x, 60.5), (x + 4, 60.5)], GOLD, 2)
    brush.polygon([(20, 42), (5, 33), (6, 46), (18, 49)], look.accent)
    _crest(brush, look)
    brush.polygon([(50, 20), (60, 25), (50, 29)], GOLD)
    brush.patterned(lambda b, fill: b.ellipse(31, 43, 16, 12.5, fill), look, (31, 43))
    brush.ellipse(43, 24, 10, 9.5, look.color)
    brush.ellipse(26, 44, 9, 6, look.accent)
    if look.band:
        brush.line([(33, 32.5), (41, 36), (50, 34)], INK, 6.2)
        brush.line([(33.6, 32.7), (41, 36), (49.4, 34.1)], look.band, 4)
    brush.ellipse(46, 22.5, 2.6, 2.8, INK, ink=False)
    brush.ellipse(46.8, 21.6, 0.9, 0.9, (255, 255, 255), ink=False)


def car(brush: Brush, look: Look) -> None:
    if look.detail == "soft":  # open: a windscreen, a seat and a wheel
        brush.polygon([(17, 37), (17, 26), (25, 26), (28, 37)], look.accent)
        brush.line([(36, 37), (42, 24)], INK, 2.6)
    elif look.detail == "pointed":
        brush.polygon([(12, 38), (31, 18), (50, 38)], look.accent)
        brush.polygon([(21, 36), (31, 25.5), (41, 36)], GLASS)
    else:
        brush.ellipse(31, 37, 19, 17, look.accent)
        brush.ellipse(31, 36, 12.5, 10, GLASS)
    brush.patterned(lambda b, fill: b.rect(5, 35, 59, 54, fill, radius=6), look, (32, 44))
    if look.band:
        brush.rect(5.5, 43, 58.5, 48, look.band)
    brush.ellipse(56, 40, 2.6, 2.6, GOLD)
    for x in (18, 46):
        brush.ellipse(x, 54, 7.2, 7.2, INK)
        brush.ellipse(x, 54, 3.8, 3.8, look.accent, ink=False)


def house(brush: Brush, look: Look) -> None:
    if look.detail == "soft":
        brush.rect(8, 20, 56, 29, look.accent)
    elif look.detail == "pointed":
        brush.polygon([(6, 31), (32, 6), (58, 31)], look.accent)
    else:
        brush.ellipse(32, 30, 24, 21, look.accent)
    brush.patterned(lambda b, fill: b.rect(12, 28, 52, 61, fill), look, (32, 45))
    for x in (15.5, 39.5):
        brush.rect(x, 33, x + 9, 42, GLASS)
    if look.band:
        brush.rect(26, 44, 38, 61, look.band)
        brush.ellipse(35.2, 53, 1.1, 1.1, GOLD, ink=False)


def backpack(brush: Brush, look: Look) -> None:
    brush.line([(25, 16), (25, 10), (39, 10), (39, 16)], INK, 3)
    for x in (12.5, 51.5):
        brush.ellipse(x, 46, 4.5, 10, look.accent)
    brush.patterned(lambda b, fill: b.rect(14, 14, 50, 61, fill, radius=9), look, (32, 36))
    if look.detail == "soft":
        brush.rect(14, 14, 50, 29, look.accent, radius=5)
    elif look.detail == "pointed":
        brush.polygon([(14.5, 19), (18, 14.5), (46, 14.5), (49.5, 19), (32, 36)], look.accent)
    else:
        brush.ellipse(32, 22, 18, 10.5, look.accent)
    if look.band:
        brush.rect(14.5, 38, 49.5, 43.5, look.band)
    brush.rect(20, 45.5, 44, 57.5, look.color, radius=4)
    brush.line([(24, 50), (40, 50)], GOLD, 1.6)


FIGURES: dict[str, Callable[[Brush, Look], None]] = {
    "dog": dog,
    "cat": cat,
    "bird": bird,
    "car": car,
    "house": house,
    "backpack": backpack,
}


def _collar(brush: Brush, look: Look) -> None:
    if look.band:
        brush.rect(20.5, 36, 43.5, 42.5, look.band, radius=3)
        brush.ellipse(32, 43.5, 2.2, 2.2, GOLD)


def _ears(brush: Brush, look: Look) -> None:
    for side in (-1, 1):
        if look.detail == "soft":
            brush.ellipse(32 + 15.5 * side, 26, 4.6, 10.5, look.accent)
        elif look.detail == "pointed":
            brush.polygon([(32 + 3 * side, 15), (32 + 14 * side, 2), (32 + 15 * side, 20)], look.accent)
        else:
            brush.ellipse(32 + 12 * side, 12.5, 6.2, 6.2, look.accent)


def _crest(brush: Brush, look: Look) -> None:
    if look.detail == "soft":
        curl = [(44, 16), (42, 9), (36, 8), (34, 13), (37, 15)]
        brush.line(curl, INK, 5)
        brush.line(curl, look.accent, 3)
    elif look.detail == "pointed":
        brush.polygon([(38, 17), (37, 4), (43, 10), (49, 4), (49, 17)], look.accent)
    else:
        brush.ellipse(43, 11.5, 6, 6, look.accent)
