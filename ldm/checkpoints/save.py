"""Atomic writing of model files, with the names and in the formats that other tools read."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoints import layout
from ldm.errors import UserError
from ldm.files import atomic_write

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
HEADER_BYTES = 2**20  # for names and metadata, beside the tensors


def save_model(
    path: str | Path,
    state_dicts: Mapping[str, Mapping[str, Tensor]],
    *,
    alphas_cumprod: Tensor | None,
    dtype: torch.dtype | None = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write one SD file of `state_dicts` (see `layout.split`): .safetensors or, by suffix, .ckpt.

    Float tensors are cast to `dtype` (None keeps their dtype), integers are not, and the schedule is float32.
    alphas_cumprod: [T]; None leaves the schedule buffers out (a VAE alone has none).
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".ckpt"):
        raise UserError(
            f"`{path.suffix}` is not a model format", where=path, remedy="Use .safetensors or .ckpt."
        )
    cast = {name: cast_tensors(inner, dtype) for name, inner in state_dicts.items()}
    v_prediction = (metadata or {}).get("modelspec.prediction_type") == "v"
    write_tensors(path, layout.join(cast, alphas_cumprod, v_prediction=v_prediction), metadata=metadata)
    return path


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors as they are, in the format of the suffix; equal content gives equal bytes."""
    path, text = Path(path), dict(metadata or {})
    tensors = _own_memory(tensors)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_space(path, sum(tensor.nbytes for tensor in tensors.values()) + HEADER_BYTES)
        with atomic_write(path) as temporary:
            if path.suffix == ".ckpt":
                with temporary.open("wb") as file:  # given a name, torch would write that into the file
                    torch.save({"state_dict": tensors, "metadata": text, "global_step": 0}, file)
            else:
                save_file(tensors, temporary, metadata={"format": "pt"} | text)
                _sort_metadata(temporary)
    except OSError as error:
        raise UserError(f"The model cannot be written: {error.strerror or error}", where=path) from error


def _own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU that share no memory, as the formats require."""
    own, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        shares = tensor.untyped_storage().nbytes() != tensor.nbytes or tensor.data_ptr() in seen
        own[name] = tensor.clone() if shares else tensor
        seen.add(own[name].data_ptr())
    return own


def cast_tensors(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Casts float tensors to the dtype of the file. Raises UserError if a finite weight overflows."""
    cast = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if dtype is not None and tensor.is_floating_point() and tensor.dtype != dtype:
            before, tensor = tensor.float(), tensor.to(dtype)  # float8 has no `isinf`
            if (before.isfinite() & ~tensor.float().isfinite()).any():
                what = f"`{name}` holds values up to {before.abs().max():.3g}, too large for {dtype}"
                raise UserError(what, remedy="Save as bf16 or fp32.")
        cast[name] = tensor
    return cast


def _sort_metadata(path: Path) -> None:
    """Sorts the metadata, which safetensors writes in random order; the header is 8 bytes of length, JSON."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(length))


def check_space(path: Path, needed: int) -> None:
    """Raises UserError if fewer than `needed` bytes are free, beside a file that is being replaced."""
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        what = f"The disk has {free / 2**30:.2f} GiB free, the model would take {needed / 2**30:.2f} GiB"
        raise UserError(what, where=path, remedy="Free some space, save as fp16, or choose another folder.")
