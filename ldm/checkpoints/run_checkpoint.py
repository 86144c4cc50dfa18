"""A run's checkpoint, `logs/NAME/checkpoints/step-N.ckpt`, as a model: config, LoRA and learned tokens."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from torch import Tensor

from ldm.checkpoints.embedding import Embeddings
from ldm.checkpoints.folder import tokenizer_in
from ldm.checkpoints.hub import HubModel
from ldm.checkpoints.known import flat
from ldm.checkpoints.layout import LEARNED_TOKENS, PREFIXES, RUN_LORA
from ldm.checkpoints.lora import LayerWeights, ReadLayers, checked_layer
from ldm.checkpoints.lora_scale import LoraScale
from ldm.checkpoints.products import NAMES, is_product
from ldm.config import load_config, to_container
from ldm.errors import UserError
from ldm.families.sdxl.family import ENCODERS
from ldm.models.lora_layer import joined_factors
from ldm.models.vocabulary_files import has_vocabulary
from ldm.shipped import find_file

log = logging.getLogger(__name__)

FOLDER, CONFIG = "checkpoints", "config.yaml"
ORTHOGONAL = ("scale", "start_down", "start_up", "start_scale")  # of a LoRA whose factors begin orthonormal
KINDS = ("down", "up", *ORTHOGONAL)
INNER = ".inner."  # of an adapter's layer: the library's module, with the names that its files have
TOKEN = LEARNED_TOKENS + "word:"


def config_of(path: Path) -> Path | None:
    """The config file of the run whose checkpoint a file is; None for any other file."""
    config = path.parent.parent / CONFIG
    is_checkpoint = path.suffix == ".ckpt" and path.resolve().parent.name == FOLDER
    return config if is_checkpoint and config.is_file() else None


def run_config(path: Path) -> dict[str, Any]:
    """The config of the run whose checkpoint a file is; {} for any other file."""
    config = config_of(path)
    return {} if config is None else to_container(load_config([config]))


def tokenizer_of_run(path: Path, config: Mapping[str, Any]) -> Path | None:
    """The vocabulary that a run was trained with, where it still is, by the config beside its model or
    checkpoint; None for any other file. Exported files name no folder: other machines have none of it.

    config: `run_config` of the file.
    """
    content = config or _config_beside(path)
    text = model_params(content).get("text_encoder")
    params = text.get("params") if isinstance(text, Mapping) else None
    named = params.get("tokenizer") if isinstance(params, Mapping) else None
    if isinstance(named, str) and has_vocabulary(find_file(named)):
        return find_file(named)
    base = content.get("base_checkpoint")
    if not isinstance(base, str):
        return None
    hub = HubModel.of(find_file(base))
    folder = find_file(base) if hub is None else hub.local()
    return None if folder is None else tokenizer_in(folder)


def _config_beside(path: Path) -> Mapping[str, Any]:
    """The config of the run that left a model; {} for any other file."""
    config = path.parent / CONFIG
    try:
        is_of_run = path.name == "model.safetensors" and config.is_file()
        return to_container(load_config([config])) if is_of_run else {}
    except UserError:  # no config of a run
        return {}


def model_params(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The params of a config's model section, or the config itself where it has none; see `flat`."""
    node = config.get("model", {"params": config})
    params = node.get("params") if isinstance(node, Mapping) else None
    return flat(params) if isinstance(params, Mapping) else {}


def image_size(config: Mapping[str, Any]) -> int | None:
    """Pixels a side of a run's images."""
    data = config.get("data")
    params = data.get("params") if isinstance(data, Mapping) else None
    size = params.get("size") if isinstance(params, Mapping) else None
    return size if isinstance(size, int) and size > 0 else None


def learned_tokens(tensors: Mapping[str, Tensor]) -> dict[str, Embeddings]:
    """Word -> embeddings of the tokens that a run learns."""
    found: dict[str, dict[str, Tensor]] = {}
    for name in (name for name in tensors if TOKEN in name):
        encoder, _, word = name.removeprefix(PREFIXES["text_encoder"]).partition(TOKEN)
        found.setdefault(unquote(word), {})[encoder] = tensors[name]
    return {word: own[""] if "" in own else _of_sdxl(own) for word, own in found.items()}


def _of_sdxl(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By the beginnings of names -> by the names of the encoders."""
    return {key: own[prefix] for key, prefix in ENCODERS.items()}


def _joined(own: Mapping[str, Tensor], layer: str, *, where: object) -> dict[str, Tensor]:
    """Down and up of an `OrthogonalLoRALayer`, of twice its rank. Raises UserError for tensors of no such."""
    absent = [name for name in KINDS if name not in own]
    if absent:
        raise UserError(f"`{layer}` has no {absent[0]}", where=where)
    rank = own["scale"].numel()
    if {own[name].shape for name in ("scale", "start_scale")} != {(rank,)}:
        raise UserError(f"`{layer}` has scales of other shapes", where=where)
    for one, other in (("down", "start_down"), ("up", "start_up")):
        shape = own[one].shape
        if shape != own[other].shape or len(shape) not in (2, 4) or shape[one == "up"] != rank:
            raise UserError(f"`{other}` of `{layer}` does not fit `{one}`", where=where)
    return dict(zip(("down", "up"), joined_factors(own), strict=True))


def _place(name: str, *, where: object) -> tuple[str, str, str]:
    """Network, layer and kind of a tensor that a run trains beside its networks' own."""
    network, _, inner = name.removeprefix(RUN_LORA).partition(".")
    if INNER in inner:
        layer, _, kind = inner.partition(INNER)
        if kind in (*NAMES, "alpha"):
            return network, layer, kind
        what = "This is a checkpoint of an adapter, which only its run reads"
        raise UserError(what, where=where, remedy="Use the run's model.safetensors.")
    layer, _, kind = inner.rpartition(".")
    if kind not in KINDS:
        raise UserError(f"`{name}` belongs to no layer", where=where)
    return network, layer, kind


def _alpha(params: Mapping[str, Any], *, where: object) -> float | None:
    """Alpha of a run's LoRA, by the params of its model section; None where it is the rank."""
    trainable = params.get("trainable")
    node = trainable.get("lora") if isinstance(trainable, Mapping) else None
    if not isinstance(node, Mapping):
        what = "This is a checkpoint of a LoRA, whose alpha is in the config of its run"
        remedy = "Leave it in the run's folder, or give --config RUN/config.yaml."
        raise UserError(what, where=where, remedy=remedy)
    own = node.get("params")
    own = own if isinstance(own, Mapping) else {}
    alpha = own.get("alpha")
    if not isinstance(alpha, int | float | None):
        raise UserError(f"The alpha of the LoRA is {alpha!r}", where=where, remedy="It is a number.")
    if own.get("rank_by_timestep") is not None:
        log.warning("%s: the LoRA is read with all ranks at all timesteps", where)
    return None if alpha is None else float(alpha)


def lora_layers(
    tensors: Mapping[str, Tensor],
    state_dicts: Mapping[str, Mapping[str, Tensor]],
    params: Mapping[str, Any],
    *,
    where: object,
) -> ReadLayers:
    """The LoRA, LoHa or LoKr that a run trains, for the networks `state_dicts`; no layers without one.

    params: of the run's model section, which has a LoRA's alpha. Raises UserError if alpha is not known, or
    if a tensor fits no layer.
    """
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    own = [name for name in tensors if name.startswith(RUN_LORA)]
    if not own:
        return {}
    for name in own:
        network, layer, kind = _place(name, where=where)
        if f"{layer}.weight" not in state_dicts.get(network, {}):
            raise UserError(f"`{name}` belongs to no layer", where=where)
        found.setdefault((network, layer), {})[kind] = tensors[name]
    layers: dict[str, dict[str, LayerWeights]] = {}
    configured = None if all(map(is_product, found.values())) else _alpha(params, where=where)
    for (network, layer), weights in found.items():
        base, rank = state_dicts[network][f"{layer}.weight"], None
        if weights.keys() & set(ORTHOGONAL):
            weights = _joined(weights, layer, where=where)
            rank = len(weights["down"]) // 2
        scale = LoraScale({}, where=where)
        checked = checked_layer(weights, base, layer, scale, network=network, where=where)
        if is_product(weights):
            layers.setdefault(network, {})[layer] = checked
            continue
        down, up, all_ranks = checked
        alpha = all_ranks if configured is None else configured * (all_ranks / (rank or all_ranks))
        layers.setdefault(network, {})[layer] = (down, up, alpha)
    return layers
