"""Folders of plain pictures, whatever tool drew them, with the prompt of each where it can be known."""

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ldm.data.images import list_images, load_image
from ldm.errors import UserError
from ldm.evaluation.protocol import GeneratedImage


def read_image_folder(folder: str | Path, *, at_least: int = 1) -> list[GeneratedImage]:
    """The drawn pictures in `folder`, by name; sheets of several are left out.

    A picture's prompt is the .txt file beside it, or what this project wrote into the PNG. Either all
    pictures have one or none has. They must be of one size.
    """
    found = [(path, _said(path)) for path in list_images(folder)]
    kept = {path: said.get("prompt") for path, said in found if "prompts" not in said}
    if len(kept) < at_least:
        what = f"{len(kept)} drawn pictures are too few, {at_least} are needed"
        raise UserError(what, where=folder, remedy="Draw more of them.")
    bare = [path.name for path, prompt in kept.items() if prompt is None]
    if bare and len(bare) < len(kept):
        remedy = "Write a .txt file of that name beside it, or remove the others' prompts."
        raise UserError(f"Only some pictures have a prompt, {bare[0]} has none", where=folder, remedy=remedy)
    samples = {path: GeneratedImage(load_image(path), prompt) for path, prompt in kept.items()}
    _require_one_size(samples, folder)
    return list(samples.values())


def by_prompt(samples: Sequence[GeneratedImage]) -> dict[str, list[Image.Image]]:
    """Prompt -> its pictures, of those whose prompt is known."""
    groups: dict[str, list[Image.Image]] = {}
    for image, prompt in samples:
        if prompt is not None:
            groups.setdefault(prompt, []).append(image)
    return groups


def _said(path: Path) -> dict[str, str]:
    """What is known of a picture's making."""
    text = path.with_suffix(".txt")
    if text.exists():
        return {"prompt": " ".join(text.read_text(encoding="utf-8-sig").split())}
    with Image.open(path) as image:
        settings = image.info.get("dreambooth", "{}")
    try:
        return dict(json.loads(settings))
    except (ValueError, TypeError):
        return {}


def _require_one_size(samples: dict[Path, GeneratedImage], folder: str | Path) -> None:
    sizes = {sample.image.size: path.name for path, sample in samples.items()}
    if len(sizes) > 1:
        (one, first), (other, second) = list(sizes.items())[:2]
        what = (
            f"The pictures differ in size: {first} is {one[0]} x {one[1]}, {second} {other[0]} x {other[1]}"
        )
        raise UserError(what, where=folder, remedy="Bring them to one size.")
