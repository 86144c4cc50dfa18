"""Generate images with a trained model: sample.py --prompt "a photo of sks dog in the snow"."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from ldm.commands.entry import one_of, parser_of, run

SIZES = {"original_size": ("HEIGHT", "WIDTH"), "crop": ("TOP", "LEFT"), "target_size": ("HEIGHT", "WIDTH")}


def parse(words: Sequence[str] | None = None) -> Namespace:
    parser = parser_of(__doc__)
    _add_what(parser)
    _add_how(parser)
    _add_size_and_place(parser)
    return parser.parse_args(words)


def _add_what(parser: ArgumentParser) -> None:
    """Options of prompts and files."""
    add = parser.add_argument
    add("--prompt", nargs="+", default=[], metavar="TEXT", help="one or several, each in quotes")
    add("--prompts", metavar="FILE", help="more, one a line; or dreambooth-live, dreambooth-object")
    add("--identifier", metavar="WORD", help="for {identifier} in them (that of training)")
    add("--class_word", metavar="WORD", help="for {class_word} in them (that of training)")
    add("--model", type=Path, help="file, run folder or hub id (the newest run under logs/)")
    add("--config", type=Path, metavar="YAML", help="with a `model` section, for files that hold no config")
    add(
        "--lora",
        nargs="+",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="LoRA files to merge, at their weights (1)",
    )
    add(
        "--guidance_base",
        type=Path,
        metavar="FILE",
        help="model or run that gives the unconditional prediction",
    )
    add("--embedding", nargs="+", default=[], type=Path, metavar="FILE", help="textual-inversion files")
    add("--vae", type=Path, metavar="FILE", help="a VAE in place of the model's: a file or diffusers folder")
    add("--n", type=int, default=4, help="images of each prompt (4)")
    add("--seed", type=int, default=23, help="image i of a prompt has the seed + i (23)")


def _add_how(parser: ArgumentParser) -> None:
    """Options of the sampling."""
    add = parser.add_argument
    add(
        "--negative_prompt",
        metavar="TEXT",
        help="what the images should not show (none: zeros for SDXL, else the empty prompt)",
    )
    add("--steps", type=int, help="sampling steps (as for the samples of the model's run, else 50)")
    add(
        "--guidance_scale",
        type=float,
        help="1: no guidance (as for the samples of the model's run, else 7.5, or 5 for SDXL)",
    )
    add(
        "--sampler",
        metavar="NAME",
        help="of docs/samplers.md, or a function of an allowed package, package.name "
        "(as for the samples of the model's run, else ddim)",
    )
    add("--allow", action="append", default=[], metavar="PACKAGE", help="let a sampler be of your own code")
    add(
        "--spacing",
        type=one_of("ldm.diffusion.schedule:SPACINGS"),
        metavar="NAME",
        help="of the steps (as for the samples of the model's run, else as suits the sampler)",
    )
    add(
        "--eta",
        type=float,
        default=0.0,
        help="fresh noise in each step of ddim, 0 to 1; the other samplers have no eta (0)",
    )


def _add_size_and_place(parser: ArgumentParser) -> None:
    """Options of the images' size and start, and of where and how many at a time are computed."""
    add = parser.add_argument
    add("--height", type=int, help="pixels (as in training)")
    add("--width", type=int, help="pixels (as in training)")
    for name, what in SIZES.items():
        add(
            f"--{name}",
            type=int,
            nargs=2,
            metavar=what,
            help="pixels that SDXL is told (those of the image)",
        )
    add("--init_image", type=Path, help="image to start from instead of noise, cropped to the size")
    add("--strength", type=float, default=0.75, help="share of the steps that change it, up to 1 (0.75)")
    add("--long_prompts", action="store_true", help="encode all of a long prompt, in chunks of 75 tokens")
    add(
        "--clip_skip",
        type=int,
        metavar="N",
        help="2: the text encoder's layer before the last gives the context, SD 1.x (as in training)",
    )
    add("--batch_size", type=int, default=8, help="images at a time; no effect on the images (8)")
    add("--low_memory", action="store_true", help="guidance in two passes instead of a doubled batch")
    add("--device", help="where to compute (cuda, mps or cpu, the first that there is)")
    add(
        "--precision",
        choices=("auto", "fp32", "fp16", "bf16"),
        default="auto",
        help="of the networks (auto: bf16 on CUDA, else fp32)",
    )
    add("--out", type=Path, help="folder (a new one in `samples`, beside the file or in logs/)")


def main(options: Namespace) -> None:
    """Writes the images and their contact sheet, and prints the paths."""
    from ldm.runs.sample_images import sample_images

    sample_images(options)


def command() -> int:
    return run(lambda: main(parse()))
