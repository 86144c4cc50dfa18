"""The storybook world: a procedural data set of small captioned images with known attributes.

A `Scene` is one individual in one place. `sample_scene(seed)` and `draw(scene)` are pure functions, so an
image, its caption and its attributes, which are ground truth for the judge, follow from one number.
Coordinates are in units of a 64 x 64 canvas, with the origin at the top left.
"""

import random
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from ldm.storybook.brush import RGB, Brush, Look
from ldm.storybook.figures import FIGURES
from ldm.storybook.places import PLACES, SHADOWS

CLASSES = ("dog", "cat", "bird", "car", "house", "backpack")
PATTERNS = ("plain", "spotted", "striped")
DETAILS = ("soft", "pointed", "round")  # the shape of ears, crest, roof or flap
PALETTE: dict[str, RGB] = {
    "red": (206, 44, 48),
    "orange": (245, 138, 36),
    "yellow": (250, 216, 72),
    "green": (66, 160, 72),
    "blue": (54, 106, 214),
    "purple": (146, 78, 190),
    "white": (244, 243, 238),
    "black": (56, 54, 64),
}
COLORS = tuple(PALETTE)
BANDS = ("none", "red", "green", "blue", "yellow")  # collar, stripe, door or strap
CONTEXTS = {
    "beach": "on the beach",
    "snow": "in the snow",
    "moon": "on the moon",
    "forest": "in the forest",
    "city": "in the city",
    "desert": "in the desert",
    "grass": "on the grass",
    "night": "at night",
}
DETAIL_WORDS = {  # in the order of DETAILS
    "dog": ("floppy ears", "pointy ears", "round ears"),
    "cat": ("floppy ears", "pointy ears", "round ears"),
    "bird": ("a curly crest", "a pointy crest", "a round crest"),
    "car": ("an open roof", "a pointy roof", "a round roof"),
    "house": ("a flat roof", "a pointy roof", "a round roof"),
    "backpack": ("a square flap", "a pointy flap", "a round flap"),
}
BAND_WORDS = {"car": "stripe", "house": "door", "backpack": "strap"}  # animals wear a collar
ATTRIBUTES: dict[str, tuple[str, ...]] = {  # classes of the judge, by attribute
    "class_word": CLASSES,
    "context": tuple(CONTEXTS),
    "color": COLORS,
    "accent": COLORS,
    "pattern": PATTERNS,
    "detail": DETAILS,
    "band": BANDS,
}
SUBJECT_ATTRIBUTES = ("color", "accent", "pattern", "detail", "band")


@dataclass(frozen=True)
class Scene:
    """One image: an individual (its class and five attributes), a place, and the seed of its jitter."""

    class_word: str
    color: str
    accent: str
    pattern: str
    detail: str
    band: str
    context: str
    seed: int = 0

    def labels(self) -> dict[str, int]:
        """Attribute -> index into `ATTRIBUTES[attribute]`."""
        return {name: values.index(getattr(self, name)) for name, values in ATTRIBUTES.items()}


def sample_scene(seed: int) -> Scene:
    """A random scene: attributes are uniform, but accent and band always differ from the main colour."""
    rng = random.Random(f"scene/{seed}")
    color = rng.choice(COLORS)
    return Scene(
        class_word=rng.choice(CLASSES),
        color=color,
        accent=rng.choice([c for c in COLORS if c != color]),
        pattern=rng.choice(PATTERNS),
        detail=rng.choice(DETAILS),
        band=rng.choice([b for b in BANDS if b != color]),
        context=rng.choice(tuple(CONTEXTS)),
        seed=seed,
    )


def same_subject(scene: Scene, *, context: str, seed: int) -> Scene:
    """The same individual in another place and pose."""
    return replace(scene, context=context, seed=seed)


def draw(scene: Scene, *, size: int = 64) -> Image.Image:
    """Renders the scene -> RGB image of size x size pixels, supersampled 4 times and then averaged."""
    page, brush = _stage(scene)
    brush.ellipse(32, 60.5, 19, 2.8, SHADOWS[scene.context], ink=False)
    _draw_figure(brush, scene)
    return _scaled(page.image, size)


def draw_mask(scene: Scene, *, size: int = 64) -> Image.Image:
    """The exact mask of the scene's figure, as `draw` scales it -> image of mode L, 255 where the figure is.

    The figure, without its shadow, covers those pixels that are the same on a black page and on a white one.
    """
    page, brush = _stage(scene)
    drawn = []
    for color in ("black", "white"):
        page.image.paste(color, (0, 0, *page.image.size))
        _draw_figure(brush, scene)
        drawn.append(np.asarray(page.image, dtype=np.uint8).copy())
    covered = (drawn[0] == drawn[1]).all(axis=2)
    return _scaled(Image.fromarray(covered.astype(np.uint8) * 255), size)


def _stage(scene: Scene) -> tuple[Brush, Brush]:
    """The page with the scene's place on it, and the brush that draws there in the figure's pose."""
    rng = random.Random(f"draw/{scene.seed}")
    page = Brush.on_new_page()
    PLACES[scene.context](page, rng)
    zoom, shift, drop = rng.uniform(0.92, 1.0), rng.uniform(-2.5, 2.5), rng.uniform(-1, 1)
    return page, page.moved(
        zoom=zoom, dx=32 * (1 - zoom) + shift, dy=62 * (1 - zoom) + drop, mirror=rng.random() < 0.5
    )


def _draw_figure(brush: Brush, scene: Scene) -> None:
    band = None if scene.band == "none" else PALETTE[scene.band]
    look = Look(PALETTE[scene.color], PALETTE[scene.accent], scene.pattern, scene.detail, band)
    FIGURES[scene.class_word](brush, look)


def _scaled(image: Image.Image, size: int) -> Image.Image:
    exact = image.width % size == 0
    return image.resize((size, size), Image.Resampling.BOX if exact else Image.Resampling.LANCZOS)


# --- captions ------------------------------------------------------------------------------------------


def caption(scene: Scene, *, seed: int, rare_word_share: float = 0.15) -> str:
    """A random true caption of the scene, which mentions some of its attributes.

    With probability `rare_word_share` a random three-letter word replaces the description ("a photo of zwx
    dog"), so that the base knows identifiers, without a meaning of their own.
    """
    rng = random.Random(f"caption/{seed}")
    if rng.random() < rare_word_share:
        noun = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=3)) + " " + scene.class_word
    else:
        noun = _with_article(_description(scene, rng))
    place = " " + CONTEXTS[scene.context] if rng.random() < 0.85 else ""
    return rng.choice(("a photo of ",) * 6 + ("a picture of ", "")) + noun + place


def full_caption(scene: Scene) -> str:
    """A caption with every attribute: "a photo of a spotted orange and white dog with floppy ears ..."."""
    noun = _with_article(f"{_adjective(scene)}{scene.color} and {scene.accent} {scene.class_word}")
    return f"a photo of {noun} with {_extras(scene)} {CONTEXTS[scene.context]}"


def _description(scene: Scene, rng: random.Random) -> str:
    noun = scene.class_word
    if rng.random() < 0.2:
        return noun
    pattern = _adjective(scene) if rng.random() < 0.7 else ""
    color = scene.color if rng.random() < 0.4 else f"{scene.color} and {scene.accent}"
    extras = " with " + _extras(scene) if rng.random() < 0.5 else ""
    return f"{pattern}{color} {noun}{extras}"


def _adjective(scene: Scene) -> str:
    return "" if scene.pattern == "plain" else scene.pattern + " "


def _extras(scene: Scene) -> str:
    detail = DETAIL_WORDS[scene.class_word][DETAILS.index(scene.detail)]
    if scene.band == "none":
        return detail
    return f"{detail} and a {scene.band} {BAND_WORDS.get(scene.class_word, 'collar')}"


def _with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun
