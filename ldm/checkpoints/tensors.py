"""Safe and lazy reading of tensor files: no code in a file is run, and a tensor is read when it is used.

safetensors files hold no code. A pickle (.ckpt, .pt, .bin) is read by torch's weights-only unpickler, and one
that needs more than tensors is refused
(https://docs.pytorch.org/docs/stable/notes/serialization.html#weights-only).
"""

import difflib
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.errors import UserError
from ldm.lazy import Lazy

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
NOT_MODELS = {  # first bytes of files that are often taken for a model
    b"version https://git-lfs": ("a git LFS pointer", "Fetch the file itself with `git lfs pull`."),
    b"<": ("a web page", "Download it again; the address may need a login."),
    b"{": ("JSON text", "Name the model file itself."),
}
NESTED = ("state_dict", "model_state_dict", "model", "module")  # keys under which a pickle holds its tensors
MOST_LEVELS = 4  # of those, one in another
WRAPPERS = ("state_dict", "model_state_dict", "module", "_orig_mod", "_forward_module")  # before other names
ROOTS = ("model", "model_ema", "first_stage_model", "cond_stage_model", "conditioner")  # of SD's own names
REMAP_BYTES = 2**27
GetTensor = Callable[[str], Tensor]


class Inert:
    """Placeholder for the few classes that Lightning 1.x pickled beside the weights of SD; does nothing."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


UNREADABLE = (  # what torch.load raises of a file that is no pickle of tensors, or a damaged one
    *(RuntimeError, ValueError, TypeError, EOFError, OSError, struct.error, MemoryError, ImportError),
    *(KeyError, AttributeError, IndexError, AssertionError, ArithmeticError),
)
INERT = [
    (Inert, name)
    for name in (
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "numpy.dtype",
        "numpy.dtypes.Float64DType",
        "_codecs.encode",
    )
]


class MappedTensors(Mapping[str, Tensor]):
    """Memory-mapped tensors of a file.

    Pages that were read count as memory of the process. So the file is mapped again after REMAP_BYTES; the
    old mapping is freed with the last tensor that uses it.
    """

    def __init__(self, names: Iterable[str], map_file: Callable[[], GetTensor]):
        self._names, self._map_file = dict.fromkeys(names), map_file
        self._get, self._bytes = map_file(), 0

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        if self._bytes > REMAP_BYTES:
            self._get, self._bytes = self._map_file(), 0
        tensor = self._get(name)
        self._bytes += tensor.nbytes
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_tensors(path: str | Path) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file or a pickle, read lazily, and the file's metadata.

    Names are without what wrapped the model when it was saved, such as `module.` of a parallel training.
    Raises UserError for a file that is missing, damaged, not a model, or asks for more than tensors.
    """
    path = Path(path)
    try:
        _check_file(path)
        with path.open("rb") as file:
            start = file.read(64)
    except ValueError as error:  # a NUL in the name
        raise no_such_file(path) from error
    except OSError as error:
        what = f"The model file cannot be read: {error.strerror or error}"
        raise UserError(what, where=path, remedy="Check its name and its permissions.") from error
    if start[8:9] == b"{":  # safetensors: 8 bytes of length, then a JSON header
        tensors, metadata = _read_safetensors(path)
    else:
        for sign, (what, remedy) in NOT_MODELS.items():
            if start.startswith(sign):
                raise UserError(f"This is not a model file but {what}", where=path, remedy=remedy)
        tensors, metadata = _read_pickle(path)
    if not tensors:
        raise UserError("The file holds no tensors", where=path)
    return _unwrapped(tensors, path), metadata


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is dense, real, and has its values in memory of its own size.

    Pickles may also hold sparse, quantized, nested and complex ones, and small ones that claim to be huge.
    """
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
        return False
    if tensor.is_quantized or tensor.is_complex():
        return False
    return tensor.nbytes <= max(tensor.untyped_storage().nbytes(), 2**20)


def _unwrapped(tensors: Mapping[str, Tensor], path: Path) -> Mapping[str, Tensor]:
    """The tensors without WRAPPERS, or a `model.` too many, before their names.

    `._orig_mod` (torch.compile) may be anywhere.
    """
    table = {_own_name(name): name for name in tensors}
    if len(table) < len(tensors):
        lost = sorted(set(tensors) - set(table.values()))
        raise UserError(f"`{lost[0]}` is in the file under two names", where=path)
    if all(own == name for own, name in table.items()):
        return tensors
    return Lazy({own: partial(tensors.__getitem__, name) for own, name in table.items()})


def _own_name(name: str) -> str:
    words = [word for word in name.split(".") if word != "_orig_mod"]
    while words[:1] and (words[0] in WRAPPERS or words[0] == "model" and words[1:2] and words[1] in ROOTS):
        words = words[1:]
    return ".".join(words) or name


def no_such_file(path: Path) -> UserError:
    """The error for a model's name that is no file, with the one beside it that it may have meant."""
    beside = path.parent.glob("*") if os.path.isdir(path.parent) else ()
    models = sorted(p.name for p in beside if p.suffix in SUFFIXES)
    close = difflib.get_close_matches(path.name, models, n=1, cutoff=0.5)
    remedy = f"Did you mean {close[0]}?" if close else None
    where = repr(str(path)) if "\0" in str(path) else path
    return UserError("There is no such model file", where=where, remedy=remedy)


def _check_file(path: Path) -> None:
    """Raises UserError for a folder, a missing file or an empty one."""
    if path.is_dir():
        models = sorted(p.name for p in path.iterdir() if p.suffix in SUFFIXES)
        remedy = f"It holds {', '.join(models)}." if models else "Name a .safetensors or .ckpt file."
        raise UserError("This is a folder, not a model file", where=path, remedy=remedy)
    if not path.exists():
        raise no_such_file(path)
    if path.stat().st_size == 0:
        raise UserError("The model file is empty", where=path, remedy="Download or write it again.")


def _read_safetensors(path: Path) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    try:
        file = safe_open(path, framework="pt")
        names, metadata = list(file.keys()), file.metadata() or {}
    except SafetensorError as error:
        raise _damaged(path, error) from error
    return MappedTensors(names, lambda: safe_open(path, framework="pt").get_tensor), metadata


def _read_pickle(path: Path) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """Tensors under `state_dict`, where there is one, and the text under `metadata`."""
    mapped = zipfile.is_zipfile(path) and path.suffix != ".safetensors"  # torch.load trusts that suffix
    content = unpickle(path, mapped=mapped)
    tensors, metadata = _state_dict(content, path), content.get("metadata")
    text = metadata.items() if isinstance(metadata, dict) else ()
    text = {name: value for name, value in text if isinstance(name, str) and isinstance(value, str)}
    if not mapped:
        return tensors, text
    return MappedTensors(tensors, lambda: _state_dict(unpickle(path, mapped=True), path).__getitem__), text


def unpickle(path: Path, *, mapped: bool) -> dict[str, Any]:
    """The dict in a pickle of tensors and plain values, empty if it holds something else."""
    content = load_pickle(path, mapped=mapped)
    return content if isinstance(content, dict) else {}


def load_pickle(path: Path, *, mapped: bool) -> Any:
    """What is in a pickle of tensors and plain values; any UserError names the file.

    mapped: memory-mapped rather than read; only reading verifies the checksums in the file.
    """
    try:
        with path.open("rb") as file, torch.serialization.safe_globals(INERT):
            return torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        needed = re.search(r"GLOBAL (\S+)", str(error))
        if needed is None:
            raise _damaged(path, error) from error
        raise UserError(
            f"Refused: this pickle asks to run `{needed[1]}`, which is more than loading tensors",
            where=path,
            remedy="Get the model as .safetensors; or, if you trust its author, open it with "
            "torch.load(weights_only=False) and save its state_dict with safetensors.torch.save_file.",
        ) from error
    except UNREADABLE as error:
        raise _damaged(path, error) from error


def _state_dict(content: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle, at the top or under NESTED keys. Raises UserError if one is not plain."""
    for _ in range(MOST_LEVELS):
        inner = [content[key] for key in NESTED if isinstance(content.get(key), dict)]
        if not inner:
            break
        content = inner[0]
    tensors = {name: x for name, x in content.items() if isinstance(name, str) and isinstance(x, Tensor)}
    odd = [name for name, x in tensors.items() if not is_plain(x)]
    if odd:
        what = f"`{odd[0]}` is no plain tensor: it is sparse, quantized, complex or without values"
        raise UserError(what, where=path, remedy="Save it with dense weights.")
    return tensors


def _damaged(path: Path, error: Exception) -> UserError:
    said = str(error).rpartition("WeightsUnpickler error: ")[2]  # before it, torch advises to run the file
    reason = re.split(r"\. |\n", said.strip())[0].rstrip(".") or type(error).__name__
    remedy = f"It has {path.stat().st_size} bytes: compare that with its source and download it again."
    return UserError(f"The model file is truncated or damaged: {reason}", where=path, remedy=remedy)
