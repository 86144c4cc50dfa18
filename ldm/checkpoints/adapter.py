"""Files of LyCORIS adapters, with kohya's names of layers, which A1111 and ComfyUI read; and merging."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoints.lora import StateDicts, adapter_metadata, kohya_names
from ldm.checkpoints.save import cast_tensors, write_tensors
from ldm.lazy import Lazy

Adapted = Mapping[tuple[str, str], Mapping[str, Tensor]]  # (network, layer) -> tensors by the library's names
Weights = Mapping[tuple[str, str], Callable[[], Tensor]]  # (network, layer) -> what gives its changed weight


def save_adapter(
    path: Path,
    adapted: Adapted,
    state_dicts: StateDicts,
    *,
    algorithm: str,
    rank: int,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
) -> Path:
    """Writes adapters of the networks `state_dicts` as a safetensors file -> path.

    algorithm: the library's name of the kind.
    """
    names = kohya_names(state_dicts, adapted)
    tensors = {f"{names[at]}.{end}": x for at, own in adapted.items() for end, x in own.items()}
    about = adapter_metadata(metadata, state_dicts, path) | {"ss_network_module": "lycoris.kohya"}
    about |= {"ss_network_dim": str(rank), "ss_network_alpha": str(float(rank))}
    about["ss_network_args"] = json.dumps({"algo": algorithm})
    write_tensors(path, cast_tensors(tensors, dtype), metadata=about)
    return path


def merge_adapter(state_dicts: StateDicts, weights: Weights) -> dict[str, Mapping[str, Tensor]]:
    """Networks with the changed weights in place of their own; these are computed when they are read."""
    merged = dict(state_dicts)
    for network in {network for network, _ in weights}:
        own = state_dicts[network]
        changed = {f"{layer}.weight": weight for (at, layer), weight in weights.items() if at == network}
        merged[network] = Lazy({name: changed.get(name, partial(own.__getitem__, name)) for name in own})
    return merged
