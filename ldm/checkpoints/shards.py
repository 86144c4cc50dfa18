"""A model in shards: safetensors files of limited size, and their index, in the Hugging Face hub's format."""

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from ldm.checkpoints.save import write_tensors
from ldm.checkpoints.tensors import read_tensors
from ldm.errors import UserError
from ldm.files import atomic_write, parse_json
from ldm.lazy import Lazy

INDEX = ".safetensors.index.json"
HEADROOM = 2**17  # bytes of a shard that names and metadata may take


def write_shards(
    index: Path, tensors: Mapping[str, Tensor], *, max_bytes: int, metadata: Mapping[str, str]
) -> list[Path]:
    """Tensors as they are in files NAME-00001-of-00002.safetensors ... beside NAME.safetensors.index.json.

    Each file has at most `max_bytes`, and all have the metadata; the index is written last. Returns all these
    files, the index at the end. Raises UserError where a single tensor is larger than that.
    """
    name = index.name.removesuffix(INDEX)
    room = max_bytes - HEADROOM
    for key, tensor in tensors.items():
        if tensor.nbytes > room:
            what = f"`{key}` has {tensor.nbytes} bytes, more than a file of {max_bytes} bytes holds"
            raise UserError(what, where=index, remedy="Allow larger files, or save as fp16.")
    split = split_torch_state_dict_into_shards(
        dict(tensors), filename_pattern=f"{name}{{suffix}}.safetensors", max_shard_size=room
    )
    for file, keys in split.filename_to_tensors.items():
        write_tensors(index.with_name(file), {key: tensors[key] for key in keys}, metadata=metadata)
    text = json.dumps({"metadata": split.metadata, "weight_map": split.tensor_to_filename}, indent=2)
    with atomic_write(index) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return [*(index.with_name(file) for file in split.filename_to_tensors), index]


def shard_files(index: Path) -> dict[str, Path]:
    """Tensor -> file beside the index. Raises UserError where it is damaged or a file is missing."""
    try:
        where = parse_json(index.read_text(encoding="utf-8"))["weight_map"]
        names = {key: _plain_name(name) for key, name in where.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"The index of a model's files cannot be read: {error}", where=index) from error
    files = {key: index.with_name(name) for key, name in names.items()}
    missing = sorted({path.name for path in files.values() if not path.is_file()})
    if missing or not files:
        what = f"{len(missing)} of the files that the index lists are missing ({', '.join(missing[:3])})"
        raise UserError(what, where=index, remedy="Get all files of the model.")
    return files


def read_shards(index: Path) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """All tensors of an index's files, each read when it is used; the metadata of the first file."""
    files = shard_files(index)
    opened = {path: read_tensors(path) for path in dict.fromkeys(files.values())}
    absent = [key for key, path in files.items() if key not in opened[path][0]]
    if absent:
        raise UserError(
            f"`{absent[0]}` is not in {files[absent[0]].name}, where the index has it", where=index
        )
    make = {key: partial(opened[path][0].__getitem__, key) for key, path in files.items()}
    return Lazy(make), next(iter(opened.values()))[1]


def _plain_name(name: Any) -> str:
    """The name of a file in the index's own folder. Raises ValueError for a path to another one."""
    if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\:\0]", name):
        raise ValueError(f"{str(name)[:80]!r} is not the name of a file beside it")
    return name
