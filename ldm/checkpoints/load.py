"""Reading model files safely: no code in a file is ever run, and nothing is loaded in part.

safetensors files hold no code. A pickle (.ckpt, .pt) is read by torch's restricted unpickler, and one that
needs more than tensors is refused (https://docs.pytorch.org/docs/stable/notes/serialization.html#weights-only).
"""

import difflib
import hashlib
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ldm.checkpoints import layout
from ldm.errors import UserError

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
NOT_MODELS = {  # first bytes of files that often stand in a model's place
    b"version https://git-lfs": ("a git LFS pointer", "Fetch the file itself with `git lfs pull`."),
    b"<": ("a web page", "Download it again; the address may need a login."),
    b"{": ("JSON text", "Name the model file itself."),
}


class Inert:
    """Stands in for the few classes that Lightning 1.x pickled beside the weights of SD; does nothing."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


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


def read_checkpoint(path: str | Path, *, ema: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a Stable Diffusion file under its own names (see `layout.split`), and its text metadata.

    `ema` takes the averaged weights of the UNet, from a file that holds both.
    """
    tensors, metadata = read_tensors(path)
    what = layout.describe(tensors)
    if what is not None:
        remedy = f"Names should begin with {', '.join(layout.PREFIXES.values())}; here is {min(tensors)}."
        raise UserError(
            f"This is no Stable Diffusion model file, it looks like {what}", where=path, remedy=remedy
        )
    return (layout.choose_ema(tensors) if ema else tensors), metadata


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file or of a pickle, mapped from the disk where possible; its metadata."""
    path = Path(path)
    _check_file(path)
    with path.open("rb") as file:
        start = file.read(64)
    if start[8:9] == b"{":  # safetensors: 8 bytes of length, then a JSON header
        tensors, metadata = _read_safetensors(path)
    else:
        for sign, (what, remedy) in NOT_MODELS.items():
            if start.startswith(sign):
                raise UserError(f"This is no model file but {what}", where=path, remedy=remedy)
        tensors, metadata = _read_pickle(path)
    if not tensors:
        raise UserError("The file holds no tensors", where=path)
    return tensors, metadata


def load_parts(
    modules: Mapping[str, nn.Module], parts: Mapping[str, Mapping[str, Tensor]], *, where: object = None
) -> None:
    """Copy each part into its module, which keeps its dtype and device. All fit, or nothing is copied."""
    report = [
        line for name, module in modules.items() for line in _misfits(name, module, parts.get(name, {}))
    ]
    if report:
        what = "The weights do not fit the model:\n  " + "\n  ".join(report) + "\n"
        raise UserError(what, where=where, remedy="Use the config that the file was trained with.")
    for name, module in modules.items():
        module.load_state_dict(dict(parts[name]))


def file_hash(path: str | Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_file(path: Path) -> None:
    """Refuse what is not a file with anything in it."""
    if path.is_dir():
        models = sorted(p.name for p in path.iterdir() if p.suffix in SUFFIXES)
        remedy = f"It holds {', '.join(models)}." if models else "Name a .safetensors or .ckpt file."
        raise UserError("This is a folder, not a model file", where=path, remedy=remedy)
    if not path.exists():
        beside = sorted(p.name for p in path.parent.glob("*") if p.suffix in SUFFIXES)
        close = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.5)
        remedy = f"Did you mean {close[0]}?" if close else None
        raise UserError("There is no such model file", where=path, remedy=remedy)
    if path.stat().st_size == 0:
        raise UserError("The model file is empty", where=path, remedy="Download or write it again.")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors under `state_dict`, where there is one, and the text under `metadata`."""
    try:
        mapped = zipfile.is_zipfile(path) and path.suffix != ".safetensors"  # torch.load goes by that suffix
        with path.open("rb") as file, torch.serialization.safe_globals(INERT):
            content = torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        needed = re.search(r"GLOBAL (\S+)", str(error))
        if needed is None:
            raise _damaged(path, error) from error
        raise UserError(
            f"Refused: this pickle asks to run `{needed[1]}`, which is more than loading tensors",
            where=path,
            remedy="Get the model as .safetensors; or, if you would run its author's programs, open it with "
            "torch.load(weights_only=False) and save its state_dict with safetensors.torch.save_file.",
        ) from error
    except (RuntimeError, ValueError, EOFError, KeyError, AttributeError, IndexError, OSError) as error:
        raise _damaged(path, error) from error
    content = content if isinstance(content, dict) else {}
    tensors, metadata = (
        inner if isinstance(inner, dict) else {}
        for inner in (content.get("state_dict", content), content.get("metadata"))
    )
    tensors = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in metadata.items() if isinstance(value, str)}


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    remedy = f"It has {path.stat().st_size} bytes: compare that with its source and get it again."
    return UserError(f"The model file is cut short or damaged: {reason}", where=path, remedy=remedy)


def _misfits(name: str, module: nn.Module, part: Mapping[str, Tensor]) -> list[str]:
    """One line for each kind of misfit between a module and its part of the file."""
    own = module.state_dict()
    if own and not part:
        return [f"{name}: the file holds none of its {len(own)} tensors"]
    shapes = [
        f"{key} {list(part[key].shape)} for {list(own[key].shape)}"
        for key in own
        if key in part and part[key].shape != own[key].shape
    ]
    kinds = {
        "missing": [key for key in own if key not in part],
        "unknown": [key for key in part if key not in own],
        "of another shape": shapes,
    }
    return [f"{name}: {len(keys)} {kind} ({_some(keys)})" for kind, keys in kinds.items() if keys]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
