"""Textual-inversion files: embeddings of learned tokens, as A1111, ComfyUI, InvokeAI and diffusers use them.

In A1111 and ComfyUI the word is the name of the file; in diffusers, for a single vector, it is the key.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoints.tensors import is_plain, load_pickle, read_tensors
from ldm.errors import UserError
from ldm.families.sdxl.family import ENCODERS
from ldm.files import atomic_write

WORD = "ldm.word"  # key of the metadata: the word as it is in prompts
SEVERAL = "emb_params"  # key of several vectors, as kohya's scripts write and InvokeAI reads it
NAMELESS = (SEVERAL, "emp_params", "*", "clip_l")  # keys of tools where the word is the name of the file
SDXL = "clip_g"  # key of vectors for the second text encoder of SDXL
MOST_WORDS = 8  # a file with more tensors is not a textual inversion
UNSAFE = re.compile(r'[<>:"/\\|?*\x00-\x1f]')  # what some file system refuses in a name


Embeddings = Tensor | Mapping[str, Tensor]  # [n, D] of a word; SDXL's, {"clip_l": [n, D1], "clip_g": [n, D2]}


def save_embedding(
    folder: str | Path, word: str, vectors: Embeddings, *, metadata: Mapping[str, str]
) -> Path:
    """Writes the embeddings of a word in float32 to a file named after it -> its path."""
    path = embedding_file(folder, word)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(vectors, Tensor):
        vectors = {word if len(vectors) == 1 else SEVERAL: vectors}
    tensors = {key: tensor.detach().float().cpu().contiguous() for key, tensor in vectors.items()}
    about = {name: text for name, text in metadata.items() if name != "ldm.config"} | {WORD: word}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata=about)
    return path


def embedding_file(folder: str | Path, word: str) -> Path:
    """Where `save_embedding` writes a word."""
    return Path(folder) / f"{file_stem(word)}.safetensors"


def embeddings_beside(model: Path) -> Path:
    """The folder of the learned tokens of a run, by its model file."""
    return model.parent / "embeddings"


def read_embedding(path: str | Path) -> dict[str, Embeddings]:
    """Word -> its embeddings. Raises UserError for a file that is not a textual inversion."""
    path = Path(path)
    if path.suffix in (".pt", ".bin"):
        held, name = _tensors(load_pickle(path, mapped=False)), None
    else:
        held, metadata = read_tensors(path)
        name = metadata.get(WORD)
    fits = all(isinstance(key, str) and _is_embedding(held[key]) for key in held)
    if SDXL in held and not (fits and held.keys() == set(ENCODERS)):
        what = "This is an embedding of Stable Diffusion XL, but not for both of its text encoders"
        raise UserError(what, where=path, remedy="It should hold clip_l and clip_g.")
    if not 0 < len(held) <= MOST_WORDS or not fits:
        remedy = "A LoRA goes to --lora, a whole model to --model."
        raise UserError("This is not a textual-inversion file", where=path, remedy=remedy)
    if SDXL in held:
        return {name or path.stem: {key: torch.atleast_2d(held[key]) for key in ENCODERS}}
    if len(held) == 1 and name is not None:
        return {name: torch.atleast_2d(next(iter(held.values())))}
    words = {path.stem if key in NAMELESS else key: torch.atleast_2d(held[key]) for key in held}
    if len(words) < len(held):
        raise UserError("Several embeddings in this file have the same word", where=path)
    return words


def file_stem(word: str) -> str:
    """A word as the name of a file, which A1111 and ComfyUI take for the word: <my-dog> -> my-dog."""
    return UNSAFE.sub("", word).strip(". ") or "embedding"


def _tensors(content: Any) -> Mapping[str, Any]:
    """What a pickle holds, by word: a dict as of A1111 or diffusers, a bare tensor, or a list of tensors."""
    if isinstance(content, dict):
        named = content.get("string_to_param")
        if isinstance(named, dict):  # A1111: the keys are placeholders
            return {"*": next(iter(named.values()))} if len(named) == 1 else named
        return content
    if isinstance(content, Tensor):
        return {"*": content}
    rows = content if isinstance(content, list | tuple) else []
    if rows and all(_is_embedding(row) and row.shape[-1] == rows[0].shape[-1] for row in rows):
        return {"*": torch.cat([torch.atleast_2d(row) for row in rows])}
    return {}


def _is_embedding(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.ndim in (1, 2)
        and value.numel() > 0
        and is_plain(value)
        and value.is_floating_point()
    )
