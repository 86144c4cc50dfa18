"""Textual-inversion files: embeddings of learned tokens, as A1111, ComfyUI and diffusers read them."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoints.tensors import read_tensors, unpickle
from ldm.errors import UserError
from ldm.files import atomic_write

EMBEDDING = "embedding.safetensors"  # beside a run's model file
NAMELESS = ("emb_params", "*")  # keys that other tools use where the word is the name of the file
MOST_WORDS = 8  # a file with more tensors is not a textual inversion


def save_embedding(path: str | Path, word: str, vectors: Tensor, *, metadata: Mapping[str, str]) -> Path:
    """Writes the embeddings `vectors` [n, D] in float32; the key is the word itself -> path."""
    path = Path(path)
    with atomic_write(path) as temporary:
        save_file({word: vectors.detach().float().cpu().contiguous()}, temporary, metadata=dict(metadata))
    return path


def read_embedding(path: str | Path) -> dict[str, Tensor]:
    """Word -> embeddings [n, D]. Raises UserError for a file that is not a textual inversion."""
    path = Path(path)
    if path.suffix == ".pt" or path.suffix == ".bin":
        held = unpickle(path, mapped=False)
        tensors = held.get("string_to_param", held)
    else:
        tensors = read_tensors(path)[0]
    words = {path.stem if key in NAMELESS else key: tensors[key] for key in tensors}
    vectors = [x for x in words.values() if isinstance(x, Tensor) and x.ndim in (1, 2)]
    if len(vectors) < len(words) or len(words) > MOST_WORDS:
        remedy = "A LoRA goes to --lora, a whole model to --model."
        raise UserError("This is not a textual-inversion file", where=path, remedy=remedy)
    return {word: torch.atleast_2d(x) for word, x in words.items()}
