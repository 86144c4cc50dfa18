"""LoRA files, with the keys of kohya's sd-scripts (A1111, ComfyUI) or of PEFT (diffusers), and merging.

LoHa and LoKr files of LyCORIS are read likewise: `products`. All name layers as diffusers does. kohya's keys
have underscores for dots, and alpha is a tensor of its own; our PEFT files have no alpha, so they hold `up`
times alpha / rank. Other tools' spellings: `lora_names`.
"""

import math
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ldm.checkpoints.diffusers_names import rename, unet_table
from ldm.checkpoints.lora_names import (
    NETWORK_PREFIXES,
    PEFT_PREFIX,
    READ_PREFIXES,
    SECOND,
    LoRAKey,
    comparable,
    layer_places,
    lora_key,
    other_adapter,
    other_family,
    written_prefix,
)
from ldm.checkpoints.lora_scale import LoraScale, adapter_file, read_scale
from ldm.checkpoints.products import ProductWeights, is_product, product_shape, product_weights
from ldm.checkpoints.save import cast_tensors, write_tensors
from ldm.checkpoints.tensors import is_plain, read_tensors
from ldm.errors import UserError
from ldm.families.family import Family
from ldm.families.known import family_of
from ldm.families.sd.family import SD2
from ldm.families.sdxl.family import ENCODERS, SDXL
from ldm.families.shapes import unet_shape
from ldm.lazy import Lazy

Style = Literal["kohya", "peft"]
StateDicts = Mapping[str, Mapping[str, Tensor]]  # network -> its tensors, see `layout.split`
LoRAWeights = tuple[Tensor, Tensor, float]  # down [rank, in, ...], up [out, rank, ...], alpha
Layers = Mapping[str, Mapping[str, LoRAWeights]]  # network -> layer -> its LoRA weights
LayerWeights = LoRAWeights | ProductWeights  # of a LoRA, LoHa or LoKr
ReadLayers = Mapping[str, Mapping[str, LayerWeights]]


def save_lora(
    path: str | Path,
    layers: Layers,
    state_dicts: StateDicts,
    *,
    style: Style = "kohya",
    dtype: torch.dtype | None = torch.float16,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes LoRA weights for the networks `state_dicts` as a safetensors file -> path."""
    places = [(network, layer) for network, inner in layers.items() for layer in inner]
    kohya = style == "kohya"
    names = kohya_names(state_dicts, places) if kohya else _peft_names(state_dicts, places)
    tensors: dict[str, Tensor] = {}
    for network, layer in places:
        down, up, alpha = layers[network][layer]
        if kohya:
            found = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(alpha)}
        else:
            found = {"lora_A.weight": down, "lora_B.weight": up * (alpha / len(down))}
        tensors |= {f"{names[network, layer]}.{end}": tensor for end, tensor in found.items()}
    about = adapter_metadata(metadata or {}, state_dicts, Path(path))
    if kohya:
        down, _, alpha = next(weights for inner in layers.values() for weights in inner.values())
        about |= {"ss_network_module": "networks.lora", "ss_network_dim": str(len(down))}
        about |= {"ss_network_alpha": str(alpha)}
    write_tensors(path, cast_tensors(tensors, dtype), metadata=about)
    return Path(path)


def kohya_names(state_dicts: StateDicts, places: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """(network, SD's name of a layer) -> the name in kohya's files, which has SD's own for SDXL's UNet."""
    theirs, is_sdxl = _names(state_dicts), family_of(state_dicts) is SDXL
    return {
        (network, layer): written_prefix(network, layer, kohya=True)
        + (layer if is_sdxl and network == "unet" else theirs[network][layer]).replace(".", "_")
        for network, layer in places
    }


def _peft_names(state_dicts: StateDicts, places: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    theirs = _names(state_dicts)
    return {
        (network, layer): written_prefix(network, layer, kohya=False) + theirs[network][layer]
        for network, layer in places
    }


def lora_beside(model: Path) -> Path:
    """The file of a run's LoRA alone, by its model file: named after the run, as LoRAs are called by name."""
    return model.parent / "loras" / f"{model.resolve().parent.name}.safetensors"


def read_lora(path: str | Path, state_dicts: StateDicts) -> ReadLayers:
    """The LoRA, LoHa or LoKr in a file, or the LoRA in a folder of PEFT's, for the networks `state_dicts`.

    Raises UserError for another kind of adapter, or if a key or a shape does not fit these networks.
    """
    path = adapter_file(Path(path))
    tensors, metadata = read_tensors(path)
    kind = other_adapter(tensors)
    if kind is not None:
        what = f"This is {kind}, not a plain LoRA, LoHa or LoKr"
        raise UserError(what, where=path, remedy="Use one of these.")
    scale = read_scale(path, metadata, own_format=any(key.startswith(PEFT_PREFIX) for key in tensors))
    names = _names(state_dicts)
    places = layer_places(names)
    if family_of(state_dicts) is SDXL:
        places |= _second_places(names)
    keys = {key: lora_key(key) for key in tensors}
    nameless = _networks_of_nameless(keys, tensors, places, state_dicts)
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, spelt in keys.items():
        networks = [] if spelt is None else [spelt.network] if spelt.network else nameless
        places_of = [(network, comparable(spelt.layer)) for network in networks]
        place = next((places[name] for name in places_of if name in places), None)
        if place is None:
            raise _stranger(key, tensors, family_of(state_dicts), where=path)
        if spelt.kind in found.setdefault(place, {}):
            raise UserError(f"`{key}` is in the file under two names", where=path)
        found[place][spelt.kind] = tensors[key]
    layers: dict[str, dict[str, LayerWeights]] = {network: {} for network in NETWORK_PREFIXES}
    for (network, layer), weights in found.items():
        base = state_dicts[network][f"{layer}.weight"]
        own = SECOND if layer.startswith(ENCODERS["clip_g"]) else network  # whose config has the alpha
        theirs = names[network][layer]
        layers[network][layer] = checked_layer(weights, base, theirs, scale, network=own, where=path)
    return layers


def _networks_of_nameless(
    keys: Mapping[str, LoRAKey | None],
    tensors: Mapping[str, Tensor],
    places: Mapping[tuple[str, str], tuple[str, str]],
    state_dicts: StateDicts,
) -> list[str]:
    """Where layers are looked for whose names tell no network: first the network that takes them all.

    SDXL's text encoders share the names of their layers, and only the widths tell them apart.
    """
    nameless: dict[str, dict[str, Tensor]] = {}
    for key, spelt in keys.items():
        if spelt is not None and spelt.network is None:
            nameless.setdefault(spelt.layer, {})[spelt.kind] = tensors[key]
    widths = {layer: _inputs(weights) for layer, weights in nameless.items()}

    def takes(network: str, layer: str, width: int) -> bool:
        place = places.get((network, comparable(layer)))
        base = None if place is None else state_dicts[place[0]][f"{place[1]}.weight"]
        return base is not None and width == base.shape[1:].numel()

    misfits = {
        network: sum(not takes(network, layer, n) for layer, n in widths.items() if n is not None)
        for network in READ_PREFIXES
    }
    return sorted(misfits, key=misfits.__getitem__)  # of equals the first, as they are listed


def _inputs(weights: Mapping[str, Tensor]) -> int | None:
    """Inputs of a layer, times the size of its kernel, by its weights in a file; None if they do not tell."""
    if "down" in weights:
        return weights["down"].shape[1:].numel()
    shape = product_shape(weights) if is_product(weights) else None
    return None if shape is None else shape[1]


def _stranger(key: str, tensors: Mapping[str, Tensor], base: Family, *, where: object) -> UserError:
    family = other_family(tensors)
    if family is not None and family != base.name:
        wanted = base.name if base is SDXL else "Stable Diffusion 1.x or 2.x"
        what = f"This is a LoRA for {family}, not for {wanted}"
    else:
        what = f"`{key}` is not a key of a LoRA of this model, which is {base.name}"
    return UserError(what, where=where, remedy="Use a plain LoRA that was trained on the same family.")


def merge_lora(
    state_dicts: StateDicts, layers: ReadLayers, *, weight: float = 1.0
) -> dict[str, Mapping[str, Tensor]]:
    """Networks with `weight` times the LoRA merged into their weights; merged tensors are float32."""
    merged = dict(state_dicts)
    for network, inner in layers.items():
        tensors = state_dicts[network]
        changed = {f"{layer}.weight": weights for layer, weights in inner.items()}
        merged[network] = Lazy(
            {
                name: partial(_add, tensors, name, changed[name], weight)
                if name in changed
                else partial(tensors.__getitem__, name)
                for name in tensors
            }
        )
    return merged


def stored_as(tensors: Mapping[str, Tensor], originals: Mapping[str, Tensor]) -> Lazy:
    """Merged tensors in the dtypes of the ones they come from."""
    return Lazy({name: partial(_cast_like, tensors, originals, name) for name in tensors})


def _cast_like(tensors: Mapping[str, Tensor], originals: Mapping[str, Tensor], name: str) -> Tensor:
    dtype = originals[name].dtype
    return cast_tensors({name: tensors[name]}, dtype)[name]


def _add(tensors: Mapping[str, Tensor], name: str, weights: LayerWeights, weight: float) -> Tensor:
    base = tensors[name]
    if isinstance(weights, ProductWeights):
        product, alpha, rank = weights.product(), weights.alpha, weights.rank
    else:
        down, up, alpha = weights
        product, rank = up.flatten(1).float() @ down.flatten(1).float(), len(down)
    return base.float() + product.reshape(base.shape).to(base.device) * (weight * alpha / rank)


def checked_layer(
    weights: Mapping[str, Tensor], base: Tensor, layer: str, scale: LoraScale, *, network: str, where: object
) -> LayerWeights:
    """The weights of a layer (its name: diffusers'), if they fit it; alpha is the file's or of `scale`."""
    stated = _stated_alpha(weights.get("alpha"), layer, where=where)
    matrices = [tensor for kind, tensor in weights.items() if kind != "alpha"]
    if not all(is_plain(x) and x.is_floating_point() for x in matrices):
        raise UserError(f"The matrices of `{layer}` are not of floating-point numbers", where=where)
    if is_product(weights):
        return product_weights(weights, base, layer, stated, where=where)
    absent = [name for name in ("down", "up") if name not in weights]
    if absent:
        raise UserError(f"`{layer}` has no {absent[0]} matrix", where=where)
    down, up = weights["down"], weights["up"]
    sizes = [(len(x), x[0].numel()) if x.ndim in (2, 4) and len(x) else (0, 0) for x in (up, down)]
    if sizes[1][0] == 0 or sizes != [(len(base), sizes[1][0]), (sizes[0][1], base[0].numel())]:
        what = f"`{layer}` takes {list(base.shape)}; not {list(down.shape)} and {list(up.shape)}"
        raise UserError(what, where=where, remedy="Use the LoRA with the model that it was trained on.")
    return down, up, scale.alpha(network, layer, len(down)) if stated is None else stated


def _stated_alpha(alpha: Tensor | None, layer: str, *, where: object) -> float | None:
    if alpha is None:
        return None
    if alpha.numel() != 1 or alpha.is_complex() or not math.isfinite(float(alpha)):
        raise UserError(f"The alpha of `{layer}` is no number", where=where)
    return float(alpha)


def _names(state_dicts: StateDicts) -> dict[str, dict[str, str]]:
    """Network -> SD's name of each layer -> diffusers' name."""
    unet = [name for name in state_dicts["unet"] if name.endswith(".weight")]
    renamed = rename(dict.fromkeys(unet), unet_table(unet_shape(state_dicts["unet"])))
    text = [name for name in state_dicts["text_encoder"] if name.endswith(".weight")]
    pairs = {
        "unet": zip(unet, renamed, strict=True),
        "text_encoder": ((name, name.partition("transformer.")[2]) for name in text),
    }
    return {
        network: {ours.removesuffix(".weight"): name.removesuffix(".weight") for ours, name in inner}
        for network, inner in pairs.items()
    }


def _second_places(names: Mapping[str, Mapping[str, str]]) -> dict[tuple[str, str], tuple[str, str]]:
    """`layer_places` of SDXL's text encoders, which share the names that files give their layers."""
    text = names["text_encoder"]
    return {
        (network, comparable(text[own])): ("text_encoder", own)
        for network, start in zip(("text_encoder", SECOND), ENCODERS.values(), strict=True)
        for own in text
        if own.startswith(start)
    }


def adapter_metadata(metadata: Mapping[str, str], state_dicts: StateDicts, path: Path) -> dict[str, str]:
    """Metadata of an adapter's file that belongs to a model file with `metadata`."""
    about = {key: text for key, text in metadata.items() if key != "ldm.config"}
    if "modelspec.architecture" in about:
        about["modelspec.architecture"] += "/lora"
    about |= {"ss_output_name": path.stem, "ss_v2": str(family_of(state_dicts) is SD2)}
    about["ss_base_model_version"] = _version(state_dicts, about)
    return about


def _version(state_dicts: StateDicts, metadata: Mapping[str, str]) -> str:
    """kohya's name of the base's family, by which A1111 sorts LoRAs."""
    family = family_of(state_dicts)
    if family is not SD2:
        return "sdxl_base_v1-0" if family is SDXL else "sd_v1"
    return "sd_v2_v" if metadata.get("modelspec.prediction_type") == "v" else "sd_v2"
