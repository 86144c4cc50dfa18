"""A model file or folder as another format: what `convert.py` does."""

import logging
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoints.embedding import (
    Embeddings,
    embedding_file,
    embeddings_beside,
    read_embedding,
    save_embedding,
)
from ldm.checkpoints.extract_lora import lora_between
from ldm.checkpoints.infer_config import SCHEDULE
from ldm.checkpoints.layout import join
from ldm.checkpoints.load import Model, open_model
from ldm.checkpoints.lora import merge_lora, read_lora, save_lora, stored_as
from ldm.checkpoints.lora_ranks import read_ranks
from ldm.checkpoints.modelspec import file_metadata, with_config_of
from ldm.checkpoints.save import DTYPES, cast_tensors, save_model
from ldm.checkpoints.save_folder import check_folder, save_folder
from ldm.checkpoints.shards import INDEX, write_shards
from ldm.config import load_config, to_container
from ldm.diffusion.schedule import make_alphas_cumprod
from ldm.errors import UserError
from ldm.families.sdxl.family import encoder_params
from ldm.model_file import check_model
from ldm.models.vocabulary import load_tokenizer
from ldm.training.trainable import BY_TIMESTEP

log = logging.getLogger(__name__)


def opened(options: Namespace) -> Model:
    """The source, checked as when it is loaded, with its LoRA merged in the dtype of each tensor."""
    config = to_container(load_config([options.config])) if options.config else None
    model = open_model(options.source, ema=options.ema, vae=options.vae, config=config)
    check_model(model, model.config)
    if options.lora is None:
        return model
    layers = read_lora(options.lora, model.state_dicts)
    if read_ranks(options.lora) is not None:
        log.warning("%s; %s has all ranks at all timesteps.", BY_TIMESTEP, options.target.name)
    merged = merge_lora(model.state_dicts, layers, weight=options.lora_weight)
    if options.dtype is None:
        merged = {name: stored_as(tensors, model.state_dicts[name]) for name, tensors in merged.items()}
    return replace(model, state_dicts=merged)


def extracted(options: Namespace) -> Path:
    """Writes the LoRA between two models, and says how much of the change it holds."""
    model, base = opened(options), open_model(options.extract_lora)
    lora = lora_between(model, base, options.rank or 16)
    count = sum(map(len, lora.layers.values()))
    print(f"{count} layers: {lora.kept:.2%} of the squared change; {lora.elsewhere:.2%} is in other tensors")
    about = described(model, title=options.source.stem)
    said = [key for key in model.metadata if key.startswith("modelspec.") and key in about]
    return save_lora(
        options.target,
        lora.layers,
        base.state_dicts,
        dtype=DTYPES[options.dtype or "fp16"],
        metadata={key: about[key] for key in said},
    )


def described(model: Model, *, title: str) -> dict[str, str]:
    """The metadata of a model, by its config where that decides; the title only where it has none."""
    size = model.size(model.config["parameterization"])
    return with_config_of(model.metadata, file_metadata(model.config, title=title, size=size))


def write_tokens(folder: Path, tokens: Mapping[str, Embeddings]) -> None:
    """Writes learned tokens. Raises UserError for a file of that name with another embedding."""
    for word, vectors in tokens.items():
        path = embedding_file(folder, word)
        if path.exists() and not is_same(read_embedding(path).get(word), vectors):
            remedy = "Remove the file, or choose a target in another folder."
            raise UserError("Another embedding is in this file", where=path, remedy=remedy)
        print(save_embedding(folder, word, vectors, metadata={}))


def is_same(stored: Embeddings | None, vectors: Embeddings) -> bool:
    """Whether a file holds these vectors; None: it is of another word."""
    if isinstance(stored, Tensor) and isinstance(vectors, Tensor):
        return torch.equal(stored, vectors.float())
    if not isinstance(stored, Mapping) or not isinstance(vectors, Mapping):
        return False
    return all(torch.equal(stored[key], vectors[key].float()) for key in stored)


def convert_model(options: Namespace) -> Path:
    """Writes the model of `convert.py`'s options -> its path."""
    if options.extract_lora is not None:
        return extracted(options)
    sharded = options.target.name.endswith(INDEX)
    to_folder = options.target.suffix not in (".safetensors", ".ckpt") and not sharded
    if to_folder:
        check_folder(options.target)
    model = opened(options)
    dtype = DTYPES[options.dtype] if options.dtype else None
    write_tokens(embeddings_beside(options.target), model.learned_tokens)
    if to_folder:
        own = encoder_params(model.config["text_encoder"]["params"])[0]["tokenizer"]
        folder = load_tokenizer(str(options.tokenizer or model.tokenizer or own)).name_or_path
        size = model.size(model.config["parameterization"])
        return save_folder(
            options.target, model.state_dicts, config=model.config, tokenizer=folder, size=size, dtype=dtype
        )
    schedule = {key: model.config[key] for key in SCHEDULE}
    alphas_cumprod = make_alphas_cumprod(**schedule, dtype=torch.float64)
    metadata = described(model, title=options.source.stem)
    if sharded:
        parts = {name: cast_tensors(part, dtype) for name, part in model.state_dicts.items()}
        tensors = join(parts, alphas_cumprod, v_prediction=model.config["parameterization"] == "v")
        max_bytes = options.max_file_mib * 2**20
        return write_shards(options.target, tensors, max_bytes=max_bytes, metadata=metadata)[-1]
    return save_model(
        options.target, model.state_dicts, alphas_cumprod=alphas_cumprod, dtype=dtype, metadata=metadata
    )
