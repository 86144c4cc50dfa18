"""Folders of generated images, of any tool, with the prompt of each where it is known."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.data.images import list_images, load_image
from ldm.data.prompts import read_text
from ldm.errors import UserError
from ldm.evaluation.protocol import GeneratedImage
from ldm.files import parse_json


def read_image_folder(folder: str | Path, *, at_least: int = 1) -> list[GeneratedImage]:
    """The generated images in `folder`, in the order of their names, without contact sheets.

    An image's prompt is in the .txt file beside it, or in the PNG's metadata from this project. Either all
    images have one or none has. They must be of one size. Raises UserError otherwise.
    """
    found = [(path, _settings(path)) for path in list_images(folder)]
    kept = {path: settings.get("prompt") for path, settings in found if "prompts" not in settings}
    if len(kept) < at_least:
        what = f"{len(kept)} generated images are too few, {at_least} are needed"
        raise UserError(what, where=folder, remedy="Generate more of them.")
    bare = [path.name for path, prompt in kept.items() if prompt is None]
    if bare and len(bare) < len(kept):
        remedy = "Write a .txt file of that name beside it, or remove the others' prompts."
        raise UserError(f"Only some images have a prompt, {bare[0]} has none", where=folder, remedy=remedy)
    samples = {path: GeneratedImage(load_image(path), prompt) for path, prompt in kept.items()}
    _require_one_size(samples, folder)
    return list(samples.values())


def is_contact_sheet(path: Path) -> bool:
    """Whether an image is one of several prompts, as this project's metadata says."""
    return "prompts" in _settings(path)


def prompt_of(path: Path) -> str | None:
    """The prompt of an image, from the .txt file beside it or from its metadata; None if it is not known."""
    return _settings(path).get("prompt")


def by_prompt(samples: Sequence[GeneratedImage]) -> dict[str, list[Image.Image]]:
    """Prompt -> its images, for those whose prompt is known."""
    groups: dict[str, list[Image.Image]] = {}
    for image, prompt in samples:
        if prompt is not None:
            groups.setdefault(prompt, []).append(image)
    return groups


def embedded_settings(path: Path) -> dict[str, Any]:
    """The settings in the metadata of a PNG of this project; {} for any other file, and for none."""
    try:
        with Image.open(path) as image:
            return dict(parse_json(image.info.get("dreambooth", "{}")))
    except (OSError, ValueError, TypeError):
        return {}


def _settings(path: Path) -> dict[str, str]:
    """The settings that an image was generated with, as far as they are known."""
    text = path.with_suffix(".txt")
    if text.exists():
        return {"prompt": " ".join(read_text(text).split())}
    settings = embedded_settings(path)
    return settings if isinstance(settings.get("prompt", ""), str) else {}


def _require_one_size(samples: dict[Path, GeneratedImage], folder: str | Path) -> None:
    sizes = {sample.image.size: path.name for path, sample in samples.items()}
    if len(sizes) > 1:
        (one, first), (other, second) = list(sizes.items())[:2]
        what = f"The images differ in size: {first} is {one[0]} x {one[1]}, {second} {other[0]} x {other[1]}"
        raise UserError(what, where=folder, remedy="Bring them to one size.")
