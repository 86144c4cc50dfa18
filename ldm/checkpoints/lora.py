"""LoRA files, with the keys of kohya's sd-scripts (A1111, ComfyUI) or of PEFT (diffusers), and merging.

Both name layers as diffusers does. kohya's keys have underscores for dots, and alpha is a tensor of its own;
PEFT assumes alpha = rank, so its files hold `up` times alpha / rank.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ldm.checkpoints.diffusers_names import rename, unet_table
from ldm.checkpoints.infer_config import unet_shape
from ldm.checkpoints.save import cast_tensors, write_tensors
from ldm.checkpoints.tensors import Lazy, read_tensors
from ldm.errors import UserError

Style = Literal["kohya", "peft"]
StateDicts = Mapping[str, Mapping[str, Tensor]]  # network -> its tensors, see `layout.split`
LoRAWeights = tuple[Tensor, Tensor, float]  # down [rank, in, ...], up [out, rank, ...], alpha
Layers = Mapping[str, Mapping[str, LoRAWeights]]  # network -> layer -> its LoRA weights
PREFIXES = {"unet": ("lora_unet_", "unet."), "text_encoder": ("lora_te_", "text_encoder.")}
ENDS = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",  # diffusers before PEFT
    ".lora.up.weight": "up",
}


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
    theirs, tensors = _names(state_dicts), {}
    for network, inner in layers.items():
        kohya, peft = PREFIXES[network]
        for layer, (down, up, alpha) in inner.items():
            if style == "kohya":
                name = kohya + theirs[network][layer].replace(".", "_")
                found = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(alpha)}
            else:
                name = peft + theirs[network][layer]
                found = {"lora_A.weight": down, "lora_B.weight": up * (alpha / len(down))}
            tensors |= {f"{name}.{end}": tensor for end, tensor in found.items()}
    write_tensors(path, cast_tensors(tensors, dtype), metadata=_about(layers, metadata or {}, style))
    return Path(path)


def read_lora(path: str | Path, state_dicts: StateDicts) -> Layers:
    """The LoRA weights in a file of either style, for the networks `state_dicts`.

    Raises UserError if a key or a shape does not fit the layers of these networks.
    """
    tensors, _ = read_tensors(Path(path))
    places = {}  # kohya's name -> (network, layer)
    for network, names in _names(state_dicts).items():
        for layer, name in names.items():
            for spelt in (layer, name):  # some files of kohya's style have SD's own names
                places[PREFIXES[network][0] + spelt.replace(".", "_")] = network, layer
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key in tensors:
        end = next((end for end in ENDS if key.endswith(end)), "")
        module = key.removesuffix(end)
        for kohya, peft in PREFIXES.values():
            if module.startswith(peft):
                module = kohya + module.removeprefix(peft).replace(".", "_")
        if not end or module not in places:
            what = f"`{key}` is not a key of a LoRA of this model"
            raise UserError(what, where=path, remedy="Use a plain LoRA that was trained on the same family.")
        found.setdefault(places[module], {})[ENDS[end]] = tensors[key]
    layers: dict[str, dict[str, LoRAWeights]] = {network: {} for network in PREFIXES}
    for (network, layer), weights in found.items():
        layers[network][layer] = _checked(
            weights, state_dicts[network][f"{layer}.weight"], where=path, layer=layer
        )
    return layers


def merge_lora(
    state_dicts: StateDicts, layers: Layers, *, weight: float = 1.0
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


def _add(tensors: Mapping[str, Tensor], name: str, weights: LoRAWeights, weight: float) -> Tensor:
    base, (down, up, alpha) = tensors[name], weights
    product = up.flatten(1).float() @ down.flatten(1).float()
    return base.float() + product.reshape(base.shape).to(base.device) * (weight * alpha / len(down))


def _checked(weights: Mapping[str, Tensor], base: Tensor, *, where: object, layer: str) -> LoRAWeights:
    absent = [name for name in ("down", "up") if name not in weights]
    if absent:
        raise UserError(f"`{layer}` has no {absent[0]} matrix", where=where)
    down, up = weights["down"], weights["up"]
    size = (len(up), up[0].numel(), down[0].numel())
    if size != (len(base), len(down), base[0].numel()):
        what = f"`{layer}` takes {list(base.shape)}; not {list(down.shape)} and {list(up.shape)}"
        raise UserError(what, where=where, remedy="Use the LoRA with the model that it was trained on.")
    return down, up, float(weights.get("alpha", len(down)))


def _names(state_dicts: StateDicts) -> dict[str, dict[str, str]]:
    """Network -> SD's name of each layer -> diffusers' name."""
    unet = [name for name in state_dicts["unet"] if name.endswith(".weight")]
    renamed = rename(dict.fromkeys(unet), unet_table(unet_shape(state_dicts["unet"])))
    text = [name for name in state_dicts["text_encoder"] if name.endswith(".weight")]
    pairs = {
        "unet": zip(unet, renamed, strict=True),
        "text_encoder": ((name, name.removeprefix("transformer.")) for name in text),
    }
    return {
        network: {ours.removesuffix(".weight"): name.removesuffix(".weight") for ours, name in inner}
        for network, inner in pairs.items()
    }


def _about(layers: Layers, metadata: Mapping[str, str], style: Style) -> dict[str, str]:
    """Metadata of the LoRA file that belongs to a model file with `metadata`."""
    about = {key: text for key, text in metadata.items() if key != "ldm.config"}
    if "modelspec.architecture" in about:
        about["modelspec.architecture"] += "/lora"
    if style == "kohya":
        down, _, alpha = next(weights for inner in layers.values() for weights in inner.values())
        about |= {"ss_network_module": "networks.lora", "ss_network_dim": str(len(down))}
        about |= {"ss_network_alpha": str(alpha)}
    return about
