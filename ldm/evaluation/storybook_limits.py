"""What the storybook's judge and base cannot do: real photos, classes and places that are new to them."""

from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from ldm.data.images import fit_image, to_tensor
from ldm.storybook.judge import SIZE, Judge
from ldm.storybook.knowledge import unknown_words
from ldm.storybook.world import ATTRIBUTES, CLASSES, CONTEXTS, Scene, draw

ALIKE = 0.96  # least likeness of drawn photos: they have 0.98 and more, photographs 0.93 at most
UNDRAWN = "The photos are not drawn by the storybook, and its judge cannot read others"
READ, POSES = 8, 1  # photos that are read at most, redrawings of each


def pixels_of(images: Sequence[Image.Image]) -> Tensor:
    """Images, one after the other -> [B, 3, 64, 64] in [-1, 1], as the judge reads them."""
    return torch.stack(list(map(_pixels, images)))


def _pixels(image: Image.Image) -> Tensor:
    return to_tensor(fit_image(image.convert("RGB"), SIZE))


def reasons_against(photos: Sequence[Image.Image], class_word: str, judge: Judge) -> list[str]:
    """Why the judge cannot judge a subject, a sentence each; none for a drawn subject of the storybook."""
    drawn = ", ".join(CLASSES)
    reasons = []
    if class_word not in CLASSES:
        reasons.append(f"The storybook does not know the class {class_word!r}: it draws {drawn}")
    if likeness(photos, judge) < ALIKE:
        reasons.append(UNDRAWN)
    return reasons


def likeness(photos: Sequence[Image.Image], judge: Judge) -> float:
    """Mean cosine, in the judge's features, of each photo and of what the judge reads in it, drawn again.

    The judge reads something in any image. That it is there shows when the storybook draws it: of a drawing
    it comes out alike, of a photograph it does not.
    """
    seen = pixels_of(photos[:READ])
    reading = judge.read(seen)
    found = []
    for k, features in enumerate(judge.features(seen)):
        read = {name: values[int(reading[name][k])] for name, values in ATTRIBUTES.items()}
        again = judge.features(pixels_of([draw(Scene(**read, seed=pose)) for pose in range(POSES)]))
        found.append(float((again @ features).max()))
    return sum(found) / len(found)


def unknown_in(prompts: Mapping[str, str], *, identifiers: Sequence[str]) -> list[str]:
    """A sentence for each prompt, where it stands -> text, with words that the storybook has never seen."""
    places = ", ".join(CONTEXTS)
    found = {where: unknown_words(text, identifiers=identifiers) for where, text in prompts.items()}
    return [
        f"{where}: the storybook has never seen {', '.join(map(repr, words))}; its places are {places}"
        for where, words in found.items()
        if words
    ]
