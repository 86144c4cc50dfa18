"""Captions of a subject's photos by a vision-language model: all but the subject, which the identifier names.

What a caption describes can be asked for later; what it leaves out is learned with the identifier.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from PIL import Image

from ldm.data.captions import FolderCaptions
from ldm.data.images import load_image
from ldm.data.prompts import contains
from ldm.errors import UserError
from ldm.evaluation.vision_language import VisionLanguageModel
from ldm.files import atomic_write

Style = Literal["sentence", "tags"]
ASKED = {
    "sentence": "Describe this photo in {language}, in one short phrase that continues 'a photo of a "
    "{class_word}': where it is, what it does, what is around it, the light and the point of view. Do not "
    "describe the {class_word} itself: not its colour, shape or material. Answer with the phrase alone.",
    "tags": "List, in {language}, up to ten short tags for this photo, separated by commas: the place, the "
    "things around the {class_word}, its pose, the light and the point of view. No tag may describe the "
    "{class_word} itself. Answer with the tags alone.",
}
MOST_TOKENS = 96


def question(class_word: str, *, style: Style, language: str) -> str:
    """What the model is asked of each photo."""
    return ASKED[style].format(class_word=class_word, language=language)


def caption_of(answer: str, subject: str, *, class_word: str, style: Style) -> str:
    """The model's answer as a caption that begins with the subject: "a photo of sks dog, asleep".

    subject: with the identifier, "a photo of sks dog"; class_word: "dog". Quotes, braces (placeholders) and
    line breaks go; so does a beginning that repeats the class word.
    """
    text = re.sub(r"[{}\"“”]", "", " ".join(answer.split())).strip(" .,;:-'")
    text = re.sub(r"^(here (is|are)|sure)\b[^:]*:\s*", "", text, flags=re.IGNORECASE)
    text = re.sub(r"^(a|an|the)?\s*(photo|picture|image) of (a|an|the)?\s*", "", text, flags=re.IGNORECASE)
    text = re.sub(rf"^((a|an|the)\s+)?{re.escape(class_word)}\b[\s,]*", "", text, flags=re.IGNORECASE)
    if style == "tags":
        tags = dict.fromkeys(tag.strip() for tag in text.split(",") if tag.strip())
        text = ", ".join(tag for tag in tags if not contains(tag, class_word))
    return f"{subject}, {text}" if text else subject


def without_caption(paths: Sequence[Path]) -> list[Path]:
    """The photos of one folder for which training would find no caption.

    Raises UserError for captions that cannot be read, and for a photo that lies where its caption would.
    """
    written = FolderCaptions(paths[0].parent)
    todo = [path for path in paths if written(path) is None]
    for path in todo:
        if path.with_suffix(".txt") == path:
            remedy = "Name it after its format, such as photo.jpg."
            raise UserError("This photo has the name of a file of captions", where=path, remedy=remedy)
    return todo


def write_captions(
    paths: Sequence[Path],
    model: VisionLanguageModel,
    *,
    asked: str,
    subject: str,
    class_word: str,
    style: Style,
    batch_size: int,
) -> Iterator[tuple[Path, str]]:
    """Captions of photos -> (photo, its caption), each when its file is written.

    paths: of photos that have none, see `without_caption`. batch_size: photos at a time. A caption that was
    written meanwhile stays.
    """
    for first in range(0, len(paths), batch_size):
        batch = paths[first : first + batch_size]
        images: list[list[Image.Image]] = [[load_image(path)] for path in batch]
        answers = model.answer([asked] * len(batch), images, max_tokens=MOST_TOKENS)
        for path, answer in zip(batch, answers, strict=True):
            written = FolderCaptions(path.parent)(path)
            if written is not None:  # meanwhile, or for a photo of the same stem
                yield path, " | ".join(caption.text for caption in written[0])
                continue
            caption = caption_of(answer, subject, class_word=class_word, style=style)
            with atomic_write(path.with_suffix(".txt")) as temporary:
                temporary.write_text(caption + "\n", encoding="utf-8")
            yield path, caption
