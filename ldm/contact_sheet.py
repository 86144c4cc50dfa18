"""Contact sheets of captioned images, and PNG files with their sampling settings."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ldm.files import atomic_write

GAP, FONT_SIZE, LINE_HEIGHT, LEAST_WIDTH = 4, 14, 20, 320  # pixels
LONGEST_CAPTION = 600  # characters
A1111_NAMES = {  # setting -> its name in the parameters line, in order
    "steps": "Steps",
    "sampler": "Sampler",
    "guidance_scale": "CFG scale",
    "seed": "Seed",
    "size": "Size",
    "model_hash": "Model hash",
    "model": "Model",
    "eta": "Eta",
    "strength": "Denoising strength",
    "clip_skip": "Clip skip",
}
A1111_SAMPLERS = {
    "ddim": "DDIM",
    "plms": "PLMS",
    "dpm++2m": "DPM++ 2M",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpm++2m_sde": "DPM++ 2M SDE",
    "unipc": "UniPC",
}


def contact_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], *, cell: int = 128) -> Image.Image:
    """A grid with one row of images for each (caption, images), below its caption, or the first part of it.

    Images smaller than `cell` pixels are enlarged by an integer factor without smoothing.
    """
    enlarged = [(caption, [_enlarge(image, cell) for image in images]) for caption, images in rows]
    sizes = [image.size for _, images in enlarged for image in images] or [(cell, cell)]
    width, height = (max(lengths) for lengths in zip(*sizes, strict=True))
    columns = max((len(images) for _, images in enlarged), default=0)
    grid_width = max(GAP + columns * (width + GAP), LEAST_WIDTH)
    captions = [_wrap(_shortened(caption), grid_width - 2 * GAP) for caption, _ in enlarged]
    row_heights = [len(lines) * LINE_HEIGHT + height + 3 * GAP for lines in captions]
    grid = Image.new("RGB", (grid_width, sum(row_heights) + GAP), "white")
    draw, y = ImageDraw.Draw(grid), GAP
    for (_, images), lines, row_height in zip(enlarged, captions, row_heights, strict=True):
        for i, line in enumerate(lines):
            draw.text((GAP, y + i * LINE_HEIGHT), line, fill="black", font=_font())
        for i, image in enumerate(images):
            grid.paste(image, (GAP + i * (width + GAP), y + len(lines) * LINE_HEIGHT + GAP))
        y += row_height
    return grid


def save_image(path: str | Path, image: Image.Image, settings: Mapping[str, Any]) -> Path:
    """Writes a PNG with its sampling settings as text, atomically.

    "dreambooth" holds all of `settings` as JSON; "parameters" the line that AUTOMATIC1111's interface and
    others read. Of the settings these appear there, where given: prompt, negative_prompt, steps, sampler,
    guidance_scale, seed, width, height, model_hash, model, eta, strength; the spacing, if it is
    "karras", and the clip_skip from 2 on.
    """
    text = PngInfo()
    text.add_text("parameters", parameters_line(settings))
    text.add_text("dreambooth", json.dumps(dict(settings), ensure_ascii=False))
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=text)
    return Path(path)


def parameters_line(settings: Mapping[str, Any]) -> str:
    """Generation parameters as AUTOMATIC1111 writes them: prompts, then `Name: value` pairs in its order."""
    lines = [settings.get("prompt", "")]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    values = dict(settings)
    if "sampler" in values:
        karras = " Karras" if values.get("spacing") == "karras" else ""
        values["sampler"] = _sampler_name(values["sampler"]) + karras
    if "width" in values and "height" in values:
        values["size"] = f"{values['width']}x{values['height']}"
    if values.get("clip_skip") == 1:
        del values["clip_skip"]
    if values.get("model_hash"):
        values["model_hash"] = values["model_hash"][:10]
    pairs = [f"{name}: {values[key]}" for key, name in A1111_NAMES.items() if values.get(key) is not None]
    return "\n".join([*lines, ", ".join(pairs)])


def _sampler_name(sampler: str | Mapping[str, Any]) -> str:
    """A sampler as AUTOMATIC1111 calls it; one of somebody's own, a node, by its own name."""
    if isinstance(sampler, str):
        return A1111_SAMPLERS.get(sampler, sampler)
    return str(sampler["target"]).rpartition(".")[2]


def _enlarge(image: Image.Image, cell: int) -> Image.Image:
    factor = max(1, -(-cell // min(image.size)))
    size = (image.width * factor, image.height * factor)
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST)


def _shortened(caption: str) -> str:
    return caption if len(caption) <= LONGEST_CAPTION else f"{caption[:LONGEST_CAPTION]}…"


def _wrap(caption: str, width: int) -> list[str]:
    """Wraps a caption to lines of at most `width` pixels; words that are longer than a line are broken."""
    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if _font().getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines.append("")
        for character in word:
            if _font().getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return [line for line in lines if line] or [""]


@functools.cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that comes with Pillow."""
    return ImageFont.load_default(size=FONT_SIZE)
