"""Convert a Stable Diffusion model: convert.py SOURCE TARGET.

SOURCE is a .ckpt file, a .safetensors file, the .safetensors.index.json of several, a diffusers folder, or an
id of the Hugging Face hub. TARGET is one of these by its suffix; without one it is a folder. With
--extract_lora BASE it is the file of a LoRA, NAME.safetensors, which added to BASE comes nearest to SOURCE.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ldm.commands.entry import one_of, parser_of, run
from ldm.errors import UserError


def parse(words: Sequence[str] | None = None) -> Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("source", type=Path, help="model file or diffusers folder")
    add("target", type=Path, help="NAME.safetensors, NAME.safetensors.index.json, NAME.ckpt, or a new folder")
    help_mib = "of each file, where TARGET is a .safetensors.index.json (16)"
    add("--max_file_mib", type=int, default=16, help=help_mib)
    dtypes = one_of("ldm.checkpoints.save:DTYPES")
    add("--dtype", type=dtypes, help="of the weights: fp32, fp16 or bf16; default: as they are")
    add("--ema", action="store_true", help="take the averaged weights of the UNet, from a file that has both")
    add("--lora", type=Path, metavar="FILE", help="a LoRA to merge into the weights")
    add("--lora_weight", type=float, default=1.0, help="its weight (1)")
    add("--extract_lora", type=Path, metavar="BASE", help="write the LoRA between this model and SOURCE")
    add("--rank", type=int, help="of the LoRA to extract (16)")
    add("--vae", type=Path, metavar="FILE", help="a VAE in place of the model's: a file or diffusers folder")
    add("--config", type=Path, metavar="YAML", help="with a `model` section, for files that hold no config")
    add("--tokenizer", metavar="FOLDER", help="of CLIP's vocabulary; default: the model's own")
    options = parser.parse_args(words)
    _check_extraction(options)
    return options


def _check_extraction(options: Namespace) -> None:
    """Refuses what does not go with --extract_lora, and --rank without it."""
    if options.extract_lora is not None:
        for name, given in (("--vae", options.vae), ("--max_file_mib", options.max_file_mib != 16)):
            if given:
                raise UserError("A LoRA is one file, without a VAE", where=name, remedy="Take it off.")
        if options.target.suffix != ".safetensors":
            remedy = "Name it NAME.safetensors."
            raise UserError("A LoRA is written as a safetensors file", where=options.target, remedy=remedy)
    elif options.rank is not None:
        raise UserError("Only a LoRA has a rank", where="--rank", remedy="Give --extract_lora BASE too.")
    if options.rank is not None and options.rank < 1:
        raise UserError(f"rank {options.rank} is impossible", where="--rank", remedy="Choose 1 or more.")


def main(options: Namespace) -> Path:
    """Writes the target -> its path."""
    from ldm.runs.convert_model import convert_model

    return convert_model(options)


def work(options: Namespace) -> None:
    written = main(options)
    from ldm.checkpoints.load import file_hash

    print(f"{written}\nsha256 {file_hash(written)}")


def command() -> int:
    return run(lambda: work(parse()))
