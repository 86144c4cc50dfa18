"""Images of prompts by a trained model, as files: what `sample.py` does."""

import hashlib
import json
import re
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from ldm.checkpoints.embedding import read_embedding
from ldm.checkpoints.find_model import find_model
from ldm.checkpoints.hub import HubModel, local_path
from ldm.checkpoints.load import Model, file_hash, open_model
from ldm.checkpoints.modelspec import sampling_defaults, taught_words
from ldm.checkpoints.save import DTYPES
from ldm.conditioner import clip_skip_of
from ldm.config import load_config, to_container
from ldm.contact_sheet import contact_sheet, save_image
from ldm.data.images import load_image
from ldm.data.prompts import fill, has_placeholder, read_prompts
from ldm.engine.device import DEVICE, keep_freed_memory
from ldm.errors import UserError
from ldm.families.sdxl.conditioning import Sizes, warn_of_small_side
from ldm.files import make_folder
from ldm.models.learned_tokens import find_words
from ldm.pipeline import Sample, Text2Image
from ldm.precision import resolve_precision
from ldm.runs.folder import new_folder
from ldm.sampler_nodes import build_sampler
from ldm.targets import allow

SIZES = ("original_size", "crop", "target_size")  # of Sizes: what SDXL is told
SETTINGS = ("negative_prompt", "steps", "guidance_scale", "sampler", "spacing", "eta", "height", "width")


def weighted(word: str) -> tuple[Path, float]:
    """FILE[:WEIGHT] -> (file, weight)."""
    file, colon, weight = word.rpartition(":")
    try:
        return (Path(file), float(weight)) if colon else (Path(word), 1.0)
    except ValueError:
        return Path(word), 1.0  # the colon is the path's


def check_embeddings(files: Sequence[Path], prompts: Sequence[str]) -> None:
    """Raises UserError for an embedding whose word no prompt has: it would change nothing."""
    for file in files:
        words = list(read_embedding(file))
        if not any(find_words(prompt, words) for prompt in prompts):
            what = f"No prompt has the word of this embedding, `{'` or `'.join(words)}`"
            raise UserError(what, where=file, remedy="Write it into a prompt, as a word of its own.")


def sizes_of(options: Namespace, pipeline: Text2Image, *, height: int, width: int) -> Sizes | None:
    """What SDXL is told of the images: what the options say, else what is usual; None for other models."""
    usual = Sizes.of_sample(height, width)
    given = [getattr(options, name) for name in SIZES]
    sizes = Sizes(*(tuple(own or other) for own, other in zip(given, usual, strict=True)))
    return Sizes.for_unet(sizes if any(given) else None, height, width, unet=pipeline.unet)


def sampler_node(name: str | None) -> str | dict[str, str] | None:
    """A sampler as `Text2Image` takes it, from a short name or the dotted name of one's own."""
    return {"target": name} if name is not None and "." in name else name


def name_of(path: Path) -> str:
    """Name of a model: its file's, or its run's."""
    return path.resolve().parent.name if path.stem == "model" else path.stem


def sample_images(options: Namespace) -> None:
    """Draws the images that the options of `sample.py` name, and prints the paths of their files."""
    if not (options.prompt or options.prompts) or options.n < 1:
        raise UserError("There is nothing to generate", remedy="Give --prompt or --prompts, and --n from 1.")
    allow(*options.allow)
    keep_freed_memory()
    options.device = options.device or DEVICE
    options.vae = None if options.vae is None else local_path(options.vae)
    path = find_model(options.model)
    precision = resolve_precision(options.precision, options.device)
    print(f"model: {path}")
    config = to_container(load_config([options.config])) if options.config else None
    model = open_model(path, vae=options.vae, config=config)
    prompts = prompts_of(options, model)
    check_embeddings(options.embedding, [*prompts, options.negative_prompt or ""])
    init_image = load_image(options.init_image) if options.init_image else None
    base = find_model(options.guidance_base) if options.guidance_base else None
    how = {"config": config, "device": options.device, "dtype": DTYPES[precision], "guidance_base": base}
    how |= {"loras": list(map(weighted, options.lora)), "embeddings": options.embedding, "vae": options.vae}
    settings = settings_of(options, model)
    build_sampler(settings["sampler"])  # refused before the networks are read
    pipeline = Text2Image.from_file(path, **how)
    settings |= {side: pipeline.default_size for side in ("height", "width") if settings[side] is None}
    settings["negative_prompt"] = pipeline.negative(settings["negative_prompt"])
    about = settings | {"model": name_of(path), "model_hash": pipeline.model_hash, "precision": precision}
    sizes = sizes_of(options, pipeline, height=settings["height"], width=settings["width"])
    if sizes is not None:
        warn_of_small_side(min(settings["height"], settings["width"]), where="--height, --width")
    about |= _added(options, pipeline, base=base, sizes=sizes, negative_prompt=settings["negative_prompt"])
    settings |= {"strength": options.strength} if init_image else {}
    own = clip_skip_of(pipeline.text_encoder)
    settings["clip_skip"] = own if options.clip_skip is None else options.clip_skip
    about |= {"clip_skip": settings["clip_skip"]} if (own, settings["clip_skip"]) != (1, 1) else {}
    settings |= {"init_image": init_image, "long_prompts": options.long_prompts, "sizes": sizes}
    rows = drawn(pipeline, prompts, options, settings)
    first = next(rows)  # a call that the pipeline refuses leaves no folder
    out = folder_of(options, path)
    images = write_images(chain([first], rows), out, prompts=prompts, about=about)
    grid = contact_sheet(list(zip(prompts, images, strict=True)))
    print(save_image(out / "contact_sheet.png", grid, {"prompts": prompts, "seed": options.seed} | about))


def folder_of(options: Namespace, path: Path) -> Path:
    """Makes the folder of the images: the one of the options, there or not, or one that no other command has.

    The latter is beside the model, of the hub's in logs/. Raises UserError where it cannot be made.
    """
    if options.out is not None:
        return make_folder(options.out)
    of_hub = options.model is not None and HubModel.of(options.model) is not None
    beside = Path("logs", name_of(path)) if of_hub else path.parent
    wanted = beside / "samples" / time.strftime("%Y-%m-%dT%H-%M-%S")
    return new_folder(wanted, remedy="Name a folder that can be written, --out FOLDER.")


def write_images(
    rows: Iterable[tuple[int, Sample]], out: Path, *, prompts: Sequence[str], about: dict[str, Any]
) -> list[list[Image.Image]]:
    """Writes each image as it comes, with its settings, and prints its path -> the images of each prompt.

    rows: number of the prompt, image.
    """
    images: list[list[Image.Image]] = [[] for _ in prompts]
    for row, sample in rows:
        slug = re.sub(r"\W+", "-", sample.prompt.lower())[:40].strip("-")
        file = out / f"{row:03d}-{slug}-{sample.seed}.png"
        written = save_image(file, sample.image, {"prompt": sample.prompt, "seed": sample.seed} | about)
        tqdm.write(str(written))
        images[row].append(sample.image)
    return images


def prompts_of(options: Namespace, model: Model) -> list[str]:
    """The prompts of the command line, then those of the file, with the words that the model was taught."""
    words = taught_words(model.metadata)
    words |= {name: getattr(options, name) for name in words if getattr(options, name)}
    given = [fill(prompt, **words) if has_placeholder(prompt) else prompt for prompt in options.prompt]
    return given + (read_prompts(options.prompts, **words) if options.prompts else [])


def settings_of(options: Namespace, model: Model) -> dict[str, Any]:
    """What the options say of the sampling, else what is usual for the model; None: the pipeline decides."""
    settings = {name: getattr(options, name) for name in SETTINGS}
    settings["sampler"] = sampler_node(options.sampler)
    usual = sampling_defaults(model.metadata, model.family)
    settings |= {name: value for name, value in usual.items() if settings[name] is None}
    return settings


def _added(
    options: Namespace,
    pipeline: Text2Image,
    *,
    base: Path | None,
    sizes: Sizes | None,
    negative_prompt: str | None,
) -> dict[str, Any]:
    """What else the files' metadata says: of the image that is changed, sizes, and files beside the model."""
    about: dict[str, Any] = {}
    if options.init_image:
        about |= {"strength": options.strength, "init_image": options.init_image.name}
        about["init_image_hash"] = file_hash(options.init_image)
    if sizes is not None:
        about |= sizes._asdict() | {"unconditional": "zeros" if negative_prompt is None else "prompt"}
    about |= {"long_prompts": True} if options.long_prompts else {}
    if options.lora:
        files = [file for file, _ in map(weighted, options.lora)]
        about |= {"lora": options.lora, "lora_hash": list(map(file_hash, files))}
    if options.embedding:
        about["embedding"] = [file.name for file in options.embedding]
        about["embedding_hash"] = list(map(file_hash, options.embedding))
    if options.config:
        config = to_container(load_config([options.config]))
        about |= {"config": Path(options.config).name, "config_hash": _content_hash(config)}
    about |= {"vae": options.vae.name, "vae_hash": file_hash(options.vae)} if options.vae else {}
    if base:
        about |= {"guidance_base": name_of(base), "guidance_base_hash": pipeline.guidance_base.model_hash}
    return about


def _content_hash(config: dict[str, Any]) -> str:
    """sha256 of what a config says, with the files that it includes."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def drawn(
    pipeline: Text2Image, prompts: Sequence[str], options: Namespace, settings: dict[str, Any]
) -> Iterator[tuple[int, Sample]]:
    """(index of its prompt, sample) of `n` samples of each prompt, batch by batch, with a bar of steps."""
    jobs = [(row, options.seed + i) for row in range(len(prompts)) for i in range(options.n)]
    how = {"batched_guidance": not options.low_memory, "batch_size": options.batch_size}
    size = max(options.batch_size, 1)
    steps = int(settings["steps"] * options.strength) if settings["init_image"] else settings["steps"]
    with tqdm(total=len(jobs) * steps, desc=f"{len(jobs)} images", unit="step") as bar:
        for batch in (jobs[first : first + size] for first in range(0, len(jobs), size)):
            rows, seeds = zip(*batch, strict=True)
            samples = pipeline(
                [prompts[i] for i in rows], seeds=seeds, progress=bar.update, **settings, **how
            )
            yield from zip(rows, samples, strict=True)
