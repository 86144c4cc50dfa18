"""Captions that are longer than the text encoder reads: what is cut off of them is said, before training."""

import logging
from collections.abc import Mapping
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


def check_lengths(prompts: Mapping[str, str], reader: Reader, *, identifier: str) -> None:
    """Warns of prompts, where they stand -> their text, that the text encoder reads only in part.

    Raises UserError where the identifier is in the part that is cut off, so that the prompt would mean the
    class.
    """
    for where, prompt in prompts.items():
        cut, length = reader.truncated_tail(prompt), reader.max_length
        if cut is None:
            continue
        read = prompt[: len(prompt) - len(cut)]
        if contains(prompt, identifier) and not contains(read, identifier):
            what = (
                f'The text encoder reads {length} tokens, and the identifier "{identifier}" comes after them'
            )
            raise UserError(f'{what}: "{cut}" is cut off', where=where, remedy="Write it earlier.")
        log.warning('%s: the text encoder reads %d tokens, so "%s" is cut off', where, length, cut)


def prompts_of(data: DreamBoothDataModule) -> dict[str, str]:
    """The prompts and captions that a run trains on, by where they stand: a key of the config, or a file."""
    found = {"subject_prompt": data.subject_prompt}
    given = data.prior_images if data.prior_batch_size and data.prior_root is not None else ()
    if data.prior_batch_size:
        found["prior_prompt"] = data.prior_prompt
    if data.captions:
        files = {image.path.with_suffix(".txt"): image.caption for image in (*data.subject_photos, *given)}
        found |= {str(file): caption for file, caption in files.items() if file.exists()}
    return found
