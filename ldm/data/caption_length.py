"""Captions that are longer than the text encoder reads: what is cut off of them is said, before training."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from ldm.data.dreambooth import DreamBoothDataModule
from ldm.data.prompts import contains
from ldm.errors import UserError

log = logging.getLogger(__name__)


class Reader(Protocol):
    """A text encoder: how many tokens it reads, those of begin and end included, and what it leaves."""

    max_length: int

    def truncated_tail(self, prompt: str) -> str | None:
        """The end of a prompt that is not read; None if all of it is."""


def check_lengths(prompts: Mapping[str, str], reader: Reader, *, identifiers: Sequence[str]) -> None:
    """Warns of prompts, where they stand -> their text, that the text encoder reads only in part.

    Raises UserError where an identifier is in the part that is cut off, so that the prompt would mean the
    class.
    """
    for where, prompt in prompts.items():
        cut, length = reader.truncated_tail(prompt), reader.max_length
        if cut is None:
            continue
        read = prompt[: len(prompt) - len(cut)]
        for word in identifiers:
            if contains(prompt, word) and not contains(read, word):
                what = f'The text encoder reads {length} tokens, and the identifier "{word}" comes after them'
                raise UserError(f'{what}: "{cut}" is cut off', where=where, remedy="Write it earlier.")
        log.warning('%s: the text encoder reads %d tokens, so "%s" is cut off', where, length, cut)


def prompts_of(data: DreamBoothDataModule) -> dict[str, str]:
    """The prompts and captions that a run trains on, by where they stand: a key of the config, or a file.

    A caption has a place of its own, its line where a file holds several; see `by_place`.
    """
    found = {}
    for concept in data.concepts:
        found[f"{concept.within}subject_prompt"] = concept.subject_prompt
        if data.prior_batch_size and concept.prior_prompt is not None:
            found[f"{concept.within}prior_prompt"] = concept.prior_prompt
    images = [(name, image) for name, photos in data.images.photos.items() for image in photos]
    images += [(known.prompt, image) for known in data.given_classes for image in data.images.of_class(known)]
    own = ((name, image.captions) for name, image in images if image.captions.is_own)
    return found | by_place(
        (place, name, text)
        for name, captions in own
        for place, text in zip(captions.places, captions.texts, strict=True)
    )


def by_place(prompts: Iterable[tuple[str, str, str]]) -> dict[str, str]:
    """(place, name of a concept, prompt) -> prompts by their place; one that each concept fills in another
    way has the concept's name there too."""
    found: dict[str, dict[str, str]] = {}
    for place, name, prompt in prompts:
        found.setdefault(place, {})[name] = prompt
    placed = {}
    for place, of_concepts in found.items():
        same = len(set(of_concepts.values())) == 1
        placed |= {place if same else f"{place}, for {name}": text for name, text in of_concepts.items()}
    return placed
