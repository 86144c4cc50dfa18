"""Convert a Stable Diffusion model: python scripts/convert.py SOURCE TARGET.

SOURCE is a .ckpt file, a .safetensors file, the .safetensors.index.json of several, or a diffusers folder.
TARGET is one of these by its suffix; without one it is a folder. With --extract_lora BASE it is the file of a
LoRA, NAME.safetensors, which added to BASE comes nearest to SOURCE.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed
from ldm.checkpoints.embedding import embeddings_beside, save_embedding
from ldm.checkpoints.extract_lora import extract_lora
from ldm.checkpoints.infer_config import SCHEDULE
from ldm.checkpoints.layout import join
from ldm.checkpoints.load import Model, file_hash, open_model
from ldm.checkpoints.lora import merge_lora, read_lora, save_lora, stored_as
from ldm.checkpoints.modelspec import file_metadata
from ldm.checkpoints.save import DTYPES, cast_tensors, save_model
from ldm.checkpoints.save_folder import check_folder, save_folder
from ldm.checkpoints.shards import INDEX, write_shards
from ldm.config import load_config, to_container
from ldm.diffusion.schedule import make_alphas_cumprod
from ldm.errors import UserError
from ldm.families.sdxl.family import encoder_params
from ldm.model_file import check_model
from ldm.models.lora import KINDS, layer_names
from ldm.models.text_encoder import load_tokenizer


def parse(words: Sequence[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("source", type=Path, help="model file or diffusers folder")
    add("target", type=Path, help="NAME.safetensors, NAME.safetensors.index.json, NAME.ckpt, or a new folder")
    add(
        "--max_file_mib", type=int, default=16, help="of each file, where TARGET is a .safetensors.index.json"
    )
    add("--dtype", choices=DTYPES, help="of the weights; default: as they are")
    add("--ema", action="store_true", help="take the averaged weights of the UNet, from a file that has both")
    add("--lora", type=Path, metavar="FILE", help="a LoRA to merge into the weights")
    add("--lora_weight", type=float, default=1.0, help="its weight (1)")
    add("--extract_lora", type=Path, metavar="BASE", help="write the LoRA between this model and SOURCE")
    add("--rank", type=int, help="of the LoRA to extract (16)")
    add("--vae", type=Path, metavar="FILE", help="a VAE in place of the model's: a file or diffusers folder")
    add("--config", type=Path, metavar="YAML", help="with a `model` section, for files that hold no config")
    add("--tokenizer", metavar="FOLDER", help="with vocab.json and merges.txt; default: the model's own")
    options = parser.parse_args(words)
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
    return options


def opened(options: argparse.Namespace) -> Model:
    """The source, checked as when it is loaded, with its LoRA merged in the dtype of each tensor."""
    config = to_container(load_config([options.config])) if options.config else None
    model = open_model(options.source, ema=options.ema, vae=options.vae, config=config)
    check_model(model, model.config)
    if options.lora is None:
        return model
    layers = read_lora(options.lora, model.state_dicts)
    merged = merge_lora(model.state_dicts, layers, weight=options.lora_weight)
    if options.dtype is None:
        merged = {name: stored_as(tensors, model.state_dicts[name]) for name, tensors in merged.items()}
    return replace(model, state_dicts=merged)


def extracted(options: argparse.Namespace) -> Path:
    """Writes the LoRA between two models, and says how much of the change it holds."""
    model, base = opened(options), open_model(options.extract_lora)
    adaptable = {network: layer_names(kinds, kinds) for network, kinds in KINDS.items()}
    lora = extract_lora(
        model.state_dicts, base.state_dicts, rank=options.rank or 16, adaptable=adaptable, where=base.path
    )
    count = sum(map(len, lora.layers.values()))
    print(f"{count} layers: {lora.kept:.2%} of the squared change; {lora.elsewhere:.2%} is in other tensors")
    metadata = {key: text for key, text in model.metadata.items() if key.startswith("modelspec.")}
    return save_lora(
        options.target,
        lora.layers,
        base.state_dicts,
        dtype=DTYPES[options.dtype or "fp16"],
        metadata=metadata,
    )


def main(options: argparse.Namespace) -> Path:
    if options.extract_lora is not None:
        return extracted(options)
    sharded = options.target.name.endswith(INDEX)
    to_folder = options.target.suffix not in (".safetensors", ".ckpt") and not sharded
    if to_folder:
        check_folder(options.target)
    model = opened(options)
    dtype = DTYPES[options.dtype] if options.dtype else None
    for word, vectors in model.learned_tokens.items():
        print(save_embedding(embeddings_beside(options.target), word, vectors, metadata={}))
    size = model.size(model.config["parameterization"])
    if to_folder:
        name = options.tokenizer or encoder_params(model.config["text_encoder"]["params"])[0]["tokenizer"]
        folder = load_tokenizer(name).name_or_path
        return save_folder(
            options.target, model.state_dicts, config=model.config, tokenizer=folder, size=size, dtype=dtype
        )
    schedule = {key: model.config[key] for key in SCHEDULE}
    alphas_cumprod = make_alphas_cumprod(**schedule, dtype=torch.float64)
    metadata = file_metadata(model.config, title=options.source.stem, size=size) | dict(model.metadata)
    if sharded:
        parts = {name: cast_tensors(part, dtype) for name, part in model.state_dicts.items()}
        tensors = join(parts, alphas_cumprod, v_prediction=model.config["parameterization"] == "v")
        max_bytes = options.max_file_mib * 2**20
        return write_shards(options.target, tensors, max_bytes=max_bytes, metadata=metadata)[-1]
    return save_model(
        options.target, model.state_dicts, alphas_cumprod=alphas_cumprod, dtype=dtype, metadata=metadata
    )


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        written = main(parse(sys.argv[1:]))
        print(f"{written}\nsha256 {file_hash(written)}")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
