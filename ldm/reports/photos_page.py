"""The page of a check-up of photos: each with what was found, and what training will show of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from ldm.reports.render import render
from ldm.reports.thumbnails import Group, embed

PHOTO_SIDE, VIEW_SIDE = 480, 192  # pixels, at most
MOST_BYTES = 4_500_000  # of all images together


@dataclass(frozen=True)
class PhotoCard:
    """A photo on the page: what was found by name, what to look at, and the views that are trained on."""

    name: str
    photo: Sequence[Image.Image]  # one, which is decoded when it is asked for
    facts: Mapping[str, str]
    troubles: Sequence[str]
    views: Sequence[Image.Image]


def photos_page(title: str, *, cards: Sequence[PhotoCard], troubles: Sequence[str], sides: str) -> str:
    """The check-up as one HTML file, which needs no other. sides: of the views, in words."""
    groups: dict[tuple[str, str], Group] = {}
    for card in cards:
        alts = [f"{card.name} as training shows it, view {k + 1}" for k in range(len(card.views))]
        groups["photo", card.name] = Group(card.photo, [card.name], PHOTO_SIDE, PHOTO_SIDE)
        groups["views", card.name] = Group(card.views, alts, VIEW_SIDE, VIEW_SIDE)
    images = embed(groups, most_bytes=MOST_BYTES)
    shown = [(card, images["photo", card.name][0], images["views", card.name]) for card in cards]
    return render("photos.html", title=title, cards=shown, troubles=troubles, sides=sides)
