"""The benchmark of Ruiz et al. 2023, section 4.1: its subjects, its prompts, and its metrics of a subject.

The data are github.com/google/dreambooth's: a folder of photos for each of 30 subjects, and
prompts_and_classes.txt, which is read as it stands. Of each of 25 prompts of a subject 4 images are measured.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from ldm.data.prompts import fill, read_text
from ldm.errors import UserError
from ldm.evaluation.features import CLIP, DINO, DINOV2, Clip, Dino, DinoV2
from ldm.evaluation.photos import mean_of_pairs, without

LISTS = "prompts_and_classes.txt"
LIVE = ("cat", "dog")  # classes of the live subjects, which have prompts of their own
METRICS = ("dino", "clip_i", "clip_t", "dinov2")
PAPER = {  # Ruiz et al. 2023, Table 1
    "Real images": {"dino": 0.774, "clip_i": 0.885},
    "DreamBooth, Imagen": {"dino": 0.696, "clip_i": 0.812, "clip_t": 0.306},
    "DreamBooth, Stable Diffusion": {"dino": 0.668, "clip_i": 0.803, "clip_t": 0.305},
    "Textual Inversion, Stable Diffusion": {"dino": 0.569, "clip_i": 0.780, "clip_t": 0.255},
}
CLASS = re.compile(r"(?P<name>[\w-]+),(?P<word>[\w -]+)")  # a line
PROMPT = re.compile(r"""(['"])(?P<text>.+)\1\.format\(unique_token, class_token\),?""")  # a line


@dataclass(frozen=True)
class BenchSubject:
    """A subject: its photos and the prompts that it is drawn for, with {identifier} and {class_word}."""

    name: str
    class_word: str
    photos: Path
    templates: tuple[str, ...]

    def prompts(self, identifier: str) -> list[str]:
        return [fill(text, identifier=identifier, class_word=self.class_word) for text in self.templates]


def read_dataset(root: Path) -> list[BenchSubject]:
    """The subjects whose folders are there, in the order of the list. Raises UserError if there are none."""
    path = root / LISTS
    if not path.is_file():
        remedy = "Give the folder `dataset` of github.com/google/dreambooth."
        raise UserError(f"The dataset has no {LISTS}", where=root, remedy=remedy)
    text = read_text(path)
    classes = {match["name"]: match["word"].strip() for match in _lines(CLASS, text)}
    classes.pop("subject_name", None)
    of_objects, _, of_live = text.partition("Live Subject Prompts")
    templates = {live: _templates(of_live if live else of_objects) for live in (True, False)}
    if not classes or not all(templates.values()):
        raise UserError("The list has no classes or prompts", where=path, remedy="Download it again.")
    for text in {prompt for group in templates.values() for prompt in group}:
        fill(text, identifier="sks", class_word="dog")  # refuses other placeholders at once
    found = [
        BenchSubject(name, word, root / name, templates[word in LIVE])
        for name, word in classes.items()
        if (root / name).is_dir()
    ]
    if not found:
        remedy = f"Its folders are {', '.join(list(classes)[:3])}, ..."
        raise UserError("The dataset has no folder of photos", where=root, remedy=remedy)
    return found


def _templates(text: str) -> tuple[str, ...]:
    found = [match["text"].replace("{0}", "{identifier}") for match in _lines(PROMPT, text)]
    return tuple(prompt.replace("{1}", "{class_word}") for prompt in found)


def _lines(pattern: re.Pattern[str], text: str) -> list[re.Match[str]]:
    """The lines that match a pattern as a whole, but for spaces around them."""
    matches = [pattern.fullmatch(line.strip()) for line in text.split("\n")]
    return [match for match in matches if match is not None]


class BenchMetrics:
    """DINO, DINOv2 and CLIP-I: means over pairs of an image and a photo. CLIP-T: of an image and its prompt.

    dino, dinov2, clip: folders of the networks in transformers' format, or names on the hub.
    """

    def __init__(self, *, dino: str = DINO, dinov2: str = DINOV2, clip: str = CLIP, device: str = "cpu"):
        self.names = {"dino": dino, "dinov2": dinov2, "clip": clip}
        self.dino = Dino(dino, device=device)
        self.dinov2 = DinoV2(dinov2, device=device)
        self.clip = Clip(clip, device=device)

    def __call__(
        self,
        images: Mapping[str, Sequence[Image.Image]],
        photos: Sequence[Image.Image],
        *,
        identifier: str,
    ) -> dict[str, float]:
        """Prompt -> its images, and the photos -> the metrics; prompts are read without `identifier`.

        "photos_dino" and so on: of the photos with one another, which nothing but a copy exceeds.
        """
        every = [image for group in images.values() for image in group]
        texts = self.clip.embed_texts([without(prompt, identifier) for prompt in images])
        counts = [len(group) for group in images.values()]
        found: dict[str, float] = {}
        for name, network in {"dino": self.dino, "clip_i": self.clip, "dinov2": self.dinov2}.items():
            rows, own = network.embed_images(every), network.embed_images(photos)
            found[name] = float((rows @ own.T).mean())
            if len(own) > 1:
                found[f"photos_{name}"] = mean_of_pairs(own)
            if name == "clip_i":
                found["clip_t"] = _mean_of_prompts(rows, texts, counts)
        return found


def _mean_of_prompts(images: Tensor, texts: Tensor, counts: Sequence[int]) -> float:
    """images: [N, D], those of a prompt next to each other; texts: [P, D]; counts: images of each prompt."""
    named = [row for row, count in zip(texts, counts, strict=True) for _ in range(count)]
    return float(sum(float(image @ text) for image, text in zip(images, named, strict=True)) / len(named))
