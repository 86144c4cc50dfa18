"""Generate images with a trained model: python scripts/sample.py --prompt "a photo of a sks dog in snow"."""

import argparse
import logging
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed
from ldm.checkpoints.embedding import read_embedding
from ldm.checkpoints.hub import HubModel, local_path
from ldm.checkpoints.load import file_hash, open_model
from ldm.checkpoints.modelspec import sampling_defaults, taught_words
from ldm.checkpoints.save import DTYPES
from ldm.config import load_config, to_container
from ldm.contact_sheet import contact_sheet, save_image
from ldm.data.images import load_image
from ldm.data.prompts import read_prompts
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import SPACINGS
from ldm.engine.device import keep_freed_memory
from ldm.errors import UserError
from ldm.families.sdxl.conditioning import Sizes
from ldm.models.text_encoder import find_words
from ldm.pipeline import Text2Image, find_model
from ldm.precision import resolve_precision

DEVICE = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
SIZES = {"original_size": ("HEIGHT", "WIDTH"), "crop": ("TOP", "LEFT"), "target_size": ("HEIGHT", "WIDTH")}
SETTINGS = ("negative_prompt", "steps", "guidance_scale", "sampler", "spacing", "eta", "height", "width")


def parse() -> argparse.Namespace:
    shows_defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shows_defaults, allow_abbrev=False)
    add = parser.add_argument
    add("--prompt", nargs="+", default=[], metavar="TEXT", help="one or several, each in quotes")
    add("--prompts", metavar="FILE", help="more, one a line; or dreambooth-live, dreambooth-object")
    add("--identifier", metavar="WORD", help="for {identifier} in them; None: that of training")
    add("--class_word", metavar="WORD", help="for {class_word} in them; None: that of training")
    add("--model", type=Path, help="file, run folder or hub id; None: the newest run of logs/")
    add("--config", type=Path, metavar="YAML", help="with a `model` section, for files that hold no config")
    add("--lora", nargs="+", default=[], metavar="FILE[:WEIGHT]", help="LoRA files to merge; weight 1")
    add(
        "--guidance_base",
        type=Path,
        metavar="FILE",
        help="model or run that gives the unconditional prediction",
    )
    add("--embedding", nargs="+", default=[], type=Path, metavar="FILE", help="textual-inversion files")
    add("--vae", type=Path, metavar="FILE", help="a VAE in place of the model's: a file or diffusers folder")
    add("--n", type=int, default=4, help="images of each prompt")
    add("--seed", type=int, default=23, help="image i of a prompt has the seed + i")
    add(
        "--negative_prompt",
        metavar="TEXT",
        help="what the images should not show; None: zeros, or for SD empty",
    )
    add("--steps", type=int, help="sampling steps; None: as for the samples of the model's run, else 50")
    add(
        "--guidance_scale",
        type=float,
        help="1: no guidance; None: as for the samples of the model's run, else 7.5, or 5 for SDXL",
    )
    add("--sampler", choices=SAMPLERS, help="None: as for the samples of the model's run, else ddim")
    add(
        "--spacing",
        choices=SPACINGS,
        help="of the steps; None: as for the samples of the model's run, else as suits the sampler",
    )
    add(
        "--eta",
        type=float,
        default=0.0,
        help="fresh noise in each step of ddim, 0 to 1; the other samplers have no eta",
    )
    add("--height", type=int, help="pixels; None: as in training")
    add("--width", type=int, help="pixels; None: as in training")
    for name, what in SIZES.items():
        add(
            f"--{name}",
            type=int,
            nargs=2,
            metavar=what,
            help="pixels that SDXL is told; None: as of the image",
        )
    add("--init_image", type=Path, help="image to start from instead of noise, cropped to the size")
    add("--strength", type=float, default=0.75, help="share of the steps that change it, up to 1")
    add("--long_prompts", action="store_true", help="encode all of a long prompt, in chunks of 75 tokens")
    add("--batch_size", type=int, default=8, help="images at a time; no effect on the images")
    add("--low_memory", action="store_true", help="guidance in two passes instead of a doubled batch")
    add("--device", default=DEVICE, help="where to compute")
    add(
        "--precision",
        choices=("auto", *DTYPES),
        default="auto",
        help="of the networks; bf16 on CUDA, else fp32",
    )
    add("--out", type=Path, help="folder; None: a new one in `samples`, beside the file or in logs/")
    return parser.parse_args()


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


def sizes_of(options: argparse.Namespace, pipeline: Text2Image, *, height: int, width: int) -> Sizes | None:
    """What SDXL is told of the images: what the options say, else what is usual; None for other models."""
    usual = Sizes.of_sample(height, width)
    given = [getattr(options, name) for name in SIZES]
    sizes = Sizes(*(tuple(own or other) for own, other in zip(given, usual, strict=True)))
    return Sizes.told(sizes if any(given) else None, height, width, to=pipeline.unet)


def name_of(path: Path) -> str:
    """Name of a model: its file's, or its run's."""
    return path.resolve().parent.name if path.stem == "model" else path.stem


def main(options: argparse.Namespace) -> None:
    if not (options.prompt or options.prompts) or options.n < 1:
        raise UserError("There is nothing to generate", remedy="Give --prompt or --prompts, and --n from 1.")
    keep_freed_memory()
    options.vae = None if options.vae is None else local_path(options.vae)
    path, precision = find_model(options.model), resolve_precision(options.precision, options.device)
    print(f"model: {path}")
    config = to_container(load_config([options.config])) if options.config else None
    model = open_model(path, vae=options.vae, config=config)
    words = taught_words(model.metadata)
    words |= {name: getattr(options, name) for name in words if getattr(options, name)}
    prompts = options.prompt + (read_prompts(options.prompts, **words) if options.prompts else [])
    init_image = load_image(options.init_image) if options.init_image else None
    check_embeddings(options.embedding, [*prompts, options.negative_prompt or ""])
    loras = [weighted(word) for word in options.lora]
    base = find_model(options.guidance_base) if options.guidance_base else None
    added = {"loras": loras, "embeddings": options.embedding, "guidance_base": base, "vae": options.vae}
    place = {"device": options.device, "dtype": DTYPES[precision]}
    pipeline = Text2Image.from_file(path, config=config, **place, **added)
    settings = {name: getattr(options, name) for name in SETTINGS}
    usual = sampling_defaults(model.metadata, model.family)
    settings |= {name: value for name, value in usual.items() if settings[name] is None}
    settings |= {side: pipeline.default_size for side in ("height", "width") if settings[side] is None}
    settings["negative_prompt"] = pipeline.negative(settings["negative_prompt"])
    about = settings | {"model": name_of(path), "model_hash": pipeline.model_hash, "precision": precision}
    if init_image:
        settings["strength"] = options.strength
        about |= {"strength": options.strength, "init_image": options.init_image.name}
    sizes = sizes_of(options, pipeline, height=settings["height"], width=settings["width"])
    if sizes is not None:
        about |= sizes._asdict() | {
            "unconditional": "zeros" if about["negative_prompt"] is None else "prompt"
        }
    settings |= {"init_image": init_image, "long_prompts": options.long_prompts, "sizes": sizes}
    about |= {"lora": options.lora} if loras else {}
    about |= {"vae": options.vae.name, "vae_hash": file_hash(options.vae)} if options.vae else {}
    if base:
        about |= {"guidance_base": name_of(base), "guidance_base_hash": pipeline.guidance_base.model_hash}
    about |= {"embedding": [file.name for file in options.embedding]} if options.embedding else {}
    how = {"batched_guidance": not options.low_memory, "batch_size": options.batch_size}
    of_hub = options.model is not None and HubModel.of(options.model) is not None
    beside = Path("logs", name_of(path)) if of_hub else path.parent
    out = options.out or beside / "samples" / time.strftime("%Y-%m-%dT%H-%M-%S")

    jobs = [(row, options.seed + i) for row in range(len(prompts)) for i in range(options.n)]
    images, size = [[] for _ in prompts], max(options.batch_size, 1)
    steps = int(settings["steps"] * options.strength) if init_image else settings["steps"]
    with tqdm(total=len(jobs) * steps, unit="step") as bar:
        for batch in (jobs[first : first + size] for first in range(0, len(jobs), size)):
            rows, seeds = zip(*batch, strict=True)
            samples = pipeline(
                [prompts[i] for i in rows], seeds=seeds, progress=bar.update, **settings, **how
            )
            out.mkdir(parents=True, exist_ok=True)
            for row, (image, _, prompt, seed) in zip(rows, samples, strict=True):
                slug = re.sub(r"\W+", "-", prompt.lower())[:40].strip("-")
                file = out / f"{row:03d}-{slug}-{seed}.png"
                bar.write(str(save_image(file, image, {"prompt": prompt, "seed": seed} | about)))
                images[row].append(image)
    grid = contact_sheet(list(zip(prompts, images, strict=True)))
    print(save_image(out / "contact_sheet.png", grid, {"prompts": prompts, "seed": options.seed} | about))


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        main(parse())
    except (UserError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
