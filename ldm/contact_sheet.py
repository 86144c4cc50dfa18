"""Pictures on paper: a sheet of captioned rows, and PNG files that say how they were made."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ldm.files import atomic_write

GAP, FONT_SIZE, LINE_HEIGHT, LEAST_WIDTH = 4, 14, 20, 320  # pixels
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
}
A1111_SAMPLERS = {"ddim": "DDIM", "plms": "PLMS", "dpm++2m": "DPM++ 2M"}


def contact_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], *, cell: int = 128) -> Image.Image:
    """One row of pictures per (caption, pictures), the caption above it, wrapped to the sheet.

    Pictures smaller than `cell` pixels are enlarged by a whole factor without smoothing, larger ones stay.
    """
    enlarged = [(caption, [_enlarge(picture, cell) for picture in pictures]) for caption, pictures in rows]
    sizes = [picture.size for _, pictures in enlarged for picture in pictures] or [(cell, cell)]
    width, height = (max(lengths) for lengths in zip(*sizes, strict=True))
    columns = max((len(pictures) for _, pictures in enlarged), default=0)
    sheet_width = max(GAP + columns * (width + GAP), LEAST_WIDTH)
    captions = [_wrap(caption, sheet_width - 2 * GAP) for caption, _ in enlarged]
    row_heights = [len(lines) * LINE_HEIGHT + height + 3 * GAP for lines in captions]
    sheet = Image.new("RGB", (sheet_width, sum(row_heights) + GAP), "white")
    draw, y = ImageDraw.Draw(sheet), GAP
    for (_, pictures), lines, row_height in zip(enlarged, captions, row_heights, strict=True):
        for i, line in enumerate(lines):
            draw.text((GAP, y + i * LINE_HEIGHT), line, fill="black", font=_font())
        for i, picture in enumerate(pictures):
            sheet.paste(picture, (GAP + i * (width + GAP), y + len(lines) * LINE_HEIGHT + GAP))
        y += row_height
    return sheet


def save_picture(path: str | Path, image: Image.Image, settings: Mapping[str, Any]) -> Path:
    """Write a PNG, whole or not at all, with its settings as text.

    "dreambooth" holds all of `settings` as JSON; "parameters" the line that AUTOMATIC1111's interface and
    others read. Of the settings these appear there, where given: prompt, negative_prompt, steps, sampler,
    guidance_scale, seed, width, height, model_hash, model, eta.
    """
    text = PngInfo()
    text.add_text("parameters", parameters_line(settings))
    text.add_text("dreambooth", json.dumps(dict(settings), ensure_ascii=False))
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=text)
    return Path(path)


def parameters_line(settings: Mapping[str, Any]) -> str:
    """Prompt, negative prompt if any, and the rest as `Name: value` pairs, in AUTOMATIC1111's order."""
    lines = [settings.get("prompt", "")]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    values = dict(settings)
    if "sampler" in values:
        values["sampler"] = A1111_SAMPLERS[values["sampler"]]
    if "width" in values and "height" in values:
        values["size"] = f"{values['width']}x{values['height']}"
    if values.get("model_hash"):
        values["model_hash"] = values["model_hash"][:10]
    pairs = [f"{name}: {values[key]}" for key, name in A1111_NAMES.items() if values.get(key) is not None]
    return "\n".join([*lines, ", ".join(pairs)])


def _enlarge(picture: Image.Image, cell: int) -> Image.Image:
    factor = max(1, -(-cell // min(picture.size)))
    size = (picture.width * factor, picture.height * factor)
    return picture.convert("RGB").resize(size, Image.Resampling.NEAREST)


def _wrap(caption: str, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken between words, or inside one that is longer than a line."""
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
    """Pillow's own: no font file is needed."""
    return ImageFont.load_default(size=FONT_SIZE)
