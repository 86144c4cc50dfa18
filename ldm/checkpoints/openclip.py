"""The text encoder of SD 2.x: OpenCLIP's names (`cond_stage_model.model.*`) and those of `CLIPTextEncoder`.

OpenCLIP fuses query, key and value to one `in_proj`, and its files hold a projection and a temperature that
Stable Diffusion doesn't use. They also hold the last of the tower's layers, though SD 2.x takes the output of
the one before it; diffusers folders leave it out.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from ldm.checkpoints.tensors import Lazy

TEXT_MODEL = "transformer.text_model."
LAYER = TEXT_MODEL + "encoder.layers."
BLOCK = "transformer.resblocks."
TABLE = {  # OpenCLIP -> CLIPTextEncoder, outside the layers
    "positional_embedding": TEXT_MODEL + "embeddings.position_embedding.weight",
    "token_embedding.weight": TEXT_MODEL + "embeddings.token_embedding.weight",
    "ln_final.weight": TEXT_MODEL + "final_layer_norm.weight",
    "ln_final.bias": TEXT_MODEL + "final_layer_norm.bias",
}
LAYER_TABLE = {  # within a layer
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
FUSED = {f"attn.in_proj_{kind}": [f"self_attn.{x}_proj.{kind}" for x in "qkv"] for kind in ("weight", "bias")}
UNUSED = ("text_projection", "logit_scale")  # in every file; no part of the tower as SD uses it
BUFFERS = ("attn_mask",)
RELEASED_LAYERS = 24  # of ViT-H-14


def from_openclip(tensors: Mapping[str, Tensor]) -> tuple[Lazy, Lazy]:
    """Names after `cond_stage_model.model.` -> the tower under its module's names, and the UNUSED rest.

    Files made of diffusers folders lack the last of the RELEASED_LAYERS; they get one, as if it were there.
    """
    text_encoder: dict[str, Callable[[], Tensor]] = {}
    for name in tensors:
        layer, inner = _inside(name, BLOCK)
        if inner in FUSED:
            for row, own in enumerate(FUSED[inner]):
                text_encoder[f"{LAYER}{layer}.{own}"] = partial(_third, tensors, name, row)
        elif name not in (*UNUSED, *BUFFERS):
            module, _, kind = inner.rpartition(".")
            inner = f"{LAYER}{layer}.{LAYER_TABLE.get(module, module)}.{kind}"
            text_encoder[inner if layer else TABLE.get(name, name)] = partial(tensors.__getitem__, name)
    rest = Lazy({name: partial(tensors.__getitem__, name) for name in UNUSED if name in tensors})
    if len({_inside(name, BLOCK)[0] for name in tensors} - {""}) == RELEASED_LAYERS - 1:
        return with_last_layer(Lazy(text_encoder), {}, layers=RELEASED_LAYERS), rest
    return Lazy(text_encoder), rest


def to_openclip(text_encoder: Mapping[str, Tensor], rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tower under OpenCLIP's names, and UNUSED of `rest`.

    Where `rest` lacks them, the identity and CLIP's upper bound of the temperature stand in.
    """
    inverse = {own: name for name, own in TABLE.items()}
    layer_inverse = {own: name for name, own in LAYER_TABLE.items()}
    fused = {own: name for name, rows in FUSED.items() for own in rows}
    tensors = {}
    for name in text_encoder:
        layer, inner = _inside(name, LAYER)
        module, _, kind = inner.rpartition(".")
        if not layer:
            tensors[inverse.get(name, name)] = text_encoder[name]
        elif inner not in fused:
            tensors[f"{BLOCK}{layer}.{layer_inverse.get(module, module)}.{kind}"] = text_encoder[name]
        elif (theirs := f"{BLOCK}{layer}.{fused[inner]}") not in tensors:
            rows = [text_encoder[f"{LAYER}{layer}.{own}"] for own in FUSED[fused[inner]]]
            tensors[theirs] = torch.cat(rows)
    positions = tensors["positional_embedding"]
    stand_ins = {
        "text_projection": torch.eye(positions.shape[1], dtype=positions.dtype),
        "logit_scale": torch.tensor(math.log(100.0), dtype=positions.dtype),
    }
    return tensors | stand_ins | {name: rest[name] for name in UNUSED if name in rest}


def with_last_layer(text_encoder: Mapping[str, Tensor], rest: Mapping[str, Tensor], *, layers: int) -> Lazy:
    """The tower of a diffusers folder, which has all but the last of `layers`, with that layer again.

    It is taken from `rest`; where it isn't kept, the layer before stands in, as nothing is computed with it.
    """
    make = {name: partial(text_encoder.__getitem__, name) for name in text_encoder}
    for name in text_encoder:
        layer, inner = _inside(name, LAYER)
        if layer == str(layers - 2):
            last = f"{LAYER}{layers - 1}.{inner}"
            make[last] = partial(rest.__getitem__, last) if last in rest else make[name]
    return Lazy(make)


def without_last_layer(text_encoder: Mapping[str, Tensor], *, layers: int) -> tuple[Lazy, Lazy]:
    """The tower as diffusers folders hold it; the last of its `layers`."""
    make = {name: partial(text_encoder.__getitem__, name) for name in text_encoder}
    last = {name for name in make if name.startswith(f"{LAYER}{layers - 1}.")}
    return tuple(Lazy({n: f for n, f in make.items() if (n in last) == wanted}) for wanted in (False, True))


def _inside(name: str, prefix: str) -> tuple[str, str]:
    """`transformer.resblocks.7.ln_1.bias` -> ("7", "ln_1.bias"); ("", name) outside the layers."""
    if not name.startswith(prefix):
        return "", name
    layer, _, inner = name.removeprefix(prefix).partition(".")
    return layer, inner


def _third(tensors: Mapping[str, Tensor], name: str, row: int) -> Tensor:
    """Query, key or value (row 0, 1 or 2) of a fused tensor [3 D, ...]."""
    return tensors[name].chunk(3)[row]
