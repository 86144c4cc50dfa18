"""Captions of photos: where they are read from, and how one is made anew for each item.

A photo's own file is read (`.txt`; `.caption`, as of sd-scripts; `.json`, as of ai-toolkit), else the line of
the folder's `metadata.jsonl` (Hugging Face's imagefolder); or one text file has captions for all photos
(OneTrainer's "single text file"), or their names are the captions.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ldm.annotations import NonNegativeInt, Probability
from ldm.data.prompts import Words, contains, fill, read_lines, read_text, require_identifier
from ldm.errors import UserError
from ldm.files import parse_json
from ldm.shipped import find_file

FILE_NAMES = "file_names"  # the value of `captions` for which names are captions
SIDECARS = (".txt", ".caption", ".json")  # of one photo; the first that exists is read
KEYS = ("caption", "captions", "text", "prompt")  # of a .json; the first that it has is read
LIST = "metadata.jsonl"  # of a folder: {"file_name": ..., "text": ...} on each line, several lines a photo
REMEDY = "Write one, or remove the file."

Draws = Callable[[str], torch.Generator]  # purpose -> the random numbers of an item


class Captions(NamedTuple):
    """The captions of a photo, one of which an item has.

    file: that they are from, if any. is_own: they are the photo's, not the prompt. places: of its own ones,
    where each stands: a file, with the line or the number of the caption where it has several.
    """

    texts: tuple[str, ...]
    file: Path | None = None
    is_own: bool = False
    places: tuple[str, ...] = ()


@dataclass(frozen=True)
class CaptionShuffle:
    """How the comma-separated parts of captions change from item to item.

    keep: parts at the head of a caption that stay as they are.
    part_dropout: share of the other parts that an item goes without, 0 to 1.
    shuffle: whether the other parts change places.
    """

    keep: NonNegativeInt = 1
    part_dropout: Probability = 0.0
    shuffle: bool = True

    def __call__(self, caption: str, draws: Draws) -> str:
        """The caption of one item: "sks dog, sunny, grass" -> "sks dog, grass, sunny"."""
        parts = parts_of(caption)
        head, rest = parts[: self.keep], parts[self.keep :]
        if self.shuffle:
            rest = [rest[k] for k in torch.randperm(len(rest), generator=draws("caption parts"))]
        kept = torch.rand(len(rest), generator=draws("caption part dropout")) >= self.part_dropout
        return ", ".join([*head, *(part for part, stays in zip(rest, kept, strict=True) if stays)])

    def check(self, caption: str, *, identifier: str, where: object) -> None:
        """Raises UserError for a caption whose identifier may be dropped."""
        if self.part_dropout and not contains(", ".join(parts_of(caption)[: self.keep]), identifier):
            what = f'The identifier "{identifier}" is not among the first {self.keep} parts of "{caption}"'
            remedy = "Write it there, raise caption_shuffle.keep, or set caption_shuffle.part_dropout to 0."
            raise UserError(f"{what}, which are kept", where=where, remedy=remedy)


def parts_of(caption: str) -> list[str]:
    """The parts of a caption between commas, without those that are empty."""
    return [part for part in map(str.strip, caption.split(",")) if part]


def draw_caption(captions: Captions, shuffle: CaptionShuffle | None, draws: Draws) -> str:
    """The caption of an item: one of its photo's, with its parts in an order of its own."""
    texts = captions.texts
    chosen = texts[0]
    if len(texts) > 1:
        chosen = texts[int(torch.randint(len(texts), (), generator=draws("caption")))]
    return chosen if shuffle is None else shuffle(chosen, draws)


class WrittenCaption(NamedTuple):
    """A caption with placeholders, and where it stands."""

    text: str
    place: str


class FolderCaptions:
    """The captions that are written for images of one folder: in their own files, or in its list."""

    def __init__(self, folder: str | Path):
        self.list_file = find_file(folder) / LIST

    def __call__(self, image: Path) -> tuple[list[WrittenCaption], Path] | None:
        """The captions of an image, with placeholders, and their file; None if it has none.

        Raises UserError for what cannot be read.
        """
        if (path := sidecar_of(image)) is not None:
            return _placed(read_sidecar(path), str(path)), path
        listed = self._listed.get(image.name)
        return (listed, self.list_file) if listed else None

    @cached_property
    def _listed(self) -> Mapping[str, list[WrittenCaption]]:
        """Name of an image -> its captions in the folder's metadata.jsonl."""
        path, found = self.list_file, defaultdict(list)
        lines = read_lines(path) if path.exists() else []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            entry = _parsed(line, where=where)
            name = entry.get("file_name") if isinstance(entry, dict) else None
            if not isinstance(name, str):
                remedy = 'Write {"file_name": "1.jpg", "text": "..."} on each line.'
                raise UserError("The line names no image", where=where, remedy=remedy)
            found[name] += _placed(_texts_of(entry, where=where), f"{where}, {name}")
        return found


class CaptionReader:
    """Reads the captions of the images of one folder, and fills {identifier} and {class_word} in.

    source: false for none, true for files beside the images, "file_names", or the path of a text file with
    a caption for all images on each line.
    """

    def __init__(self, source: bool | str, folder: str | Path, words: Words):
        self.source = source
        self.written = FolderCaptions(folder)
        self.words = words

    def __call__(self, image: Path) -> Captions | None:
        """The captions of an image; None if it has none. Raises UserError for what cannot be read."""
        if self.source is False:
            return None
        if self.source == FILE_NAMES:
            return self._filled([WrittenCaption(name_as_caption(image), str(image))], None)
        if self.source is not True:
            return self._filled(self._of_all, Path(self.source))
        found = self.written(image)
        return None if found is None else self._filled(*found)

    def _filled(self, captions: Sequence[WrittenCaption], file: Path | None) -> Captions:
        empty = [caption.place for caption in captions if not caption.text]
        if empty or not captions:
            raise UserError("The caption is empty", where=empty[0] if empty else file, remedy=REMEDY)
        texts = tuple(fill(caption.text, **self.words) for caption in captions)
        return Captions(texts, file, is_own=True, places=tuple(caption.place for caption in captions))

    @cached_property
    def _of_all(self) -> list[WrittenCaption]:
        """The lines of the text file for all images, without empty ones and comments (#)."""
        path = Path(self.source)
        if not path.is_file():
            remedy = f'Name a text file, or take true or "{FILE_NAMES}".'
            raise UserError("There is no such file of captions", where=path, remedy=remedy)
        lines = (" ".join(line.split()) for line in read_lines(path))
        return [
            WrittenCaption(line, f"{path}:{number}")
            for number, line in enumerate(lines, start=1)
            if line and not line.startswith("#")
        ]


def sidecar_of(image: Path) -> Path | None:
    """The file of captions beside an image; None if there is none."""
    paths = (image.with_suffix(suffix) for suffix in SIDECARS)
    return next((path for path in paths if path.exists() and path != image), None)


def read_sidecar(path: Path) -> list[str]:
    """The captions in an image's own file, with placeholders. Raises UserError for what cannot be read."""
    if path.suffix == ".json":
        return _texts_of(_parsed(read_text(path), where=path), where=path)
    return [" ".join(read_text(path).split())]


def name_as_caption(image: Path) -> str:
    """ "sks_dog on the moon (2).jpg" -> "sks dog on the moon": a number at its end only tells files apart."""
    words = " ".join(image.stem.replace("_", " ").split())
    return re.sub(r"[\s-]*(\(\d+\)|(?<=[\s-])\d+)$", "", words)


def subject_captions(
    reader: CaptionReader, prompt: str, shuffle: CaptionShuffle | None
) -> Callable[[Path], Captions]:
    """-> the function that gives a subject's photo its captions, or the prompt.

    It raises UserError for a caption without the identifier, or where the identifier may be dropped.
    """
    identifier = reader.words["identifier"]
    if shuffle is not None:
        shuffle.check(prompt, identifier=identifier, where="subject_prompt")

    def captions(image: Path) -> Captions:
        found = reader(image)
        if found is None:
            return Captions((prompt,))
        for text, place in zip(found.texts, found.places, strict=True):
            require_identifier(text, identifier=identifier, where=place)
            if shuffle is not None:
                shuffle.check(text, identifier=identifier, where=place)
        return found

    return captions


def class_captions(
    reader: CaptionReader, prompt: str, identifiers: Sequence[str]
) -> Callable[[Path], Captions]:
    """-> the function that gives an image of the class its captions, or the prompt.

    It raises UserError for a caption with one of the identifiers, which would be learned as the class.
    """

    def captions(image: Path) -> Captions:
        found = reader(image) or Captions((prompt,))
        for text, place in zip(found.texts, found.places, strict=False):  # the prompt has no place
            for word in (word for word in identifiers if contains(text, word)):
                what = f'The identifier "{word}" is in a caption of the class, "{text}"'
                raise UserError(what, where=place, remedy="Remove it.")
        return found

    return captions


def _placed(texts: Sequence[str], place: str) -> list[WrittenCaption]:
    """Captions of one place, of which those after the first are numbered."""
    names = [place, *(f"{place}, caption {k}" for k in range(2, len(texts) + 1))]
    return [WrittenCaption(*pair) for pair in zip(texts, names, strict=False)]


def _parsed(text: str, *, where: object) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f"The JSON cannot be read: {error}", where=where, remedy=REMEDY) from error


def _texts_of(content: Any, *, where: object) -> list[str]:
    """The captions in what a JSON says: a text, a list of texts, or a mapping with one of `KEYS`."""
    if isinstance(content, dict):
        content = next((content[key] for key in KEYS if key in content), None)
    texts = [content] if isinstance(content, str) else content
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        remedy = f"Give it one of {', '.join(KEYS)}: a text or a list of texts."
        raise UserError("The JSON holds no caption", where=where, remedy=remedy)
    return [" ".join(text.split()) for text in texts]
