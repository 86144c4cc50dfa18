"""Key table of OpenCLIP's text encoders, from and to `CLIPTextEncoder`: SD 2.x's, and SDXL's second one.

OpenCLIP fuses query, key and value to one `in_proj`, and its files hold a temperature that Stable Diffusion
doesn't use. SD 2.x (`cond_stage_model.model.*`) doesn't use the projection and the last layer either, which
diffusers folders leave out; SDXL (`conditioner.embedders.1.model.*`) takes its pooled vector from both.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.families.shapes import LAYER, TEXT_MODEL
from ldm.lazy import Lazy

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
PROJECTION = "text_projection"  # [D, P]
UNUSED = (PROJECTION, "logit_scale")  # in every file; SD 2.x does not use them
BUFFERS = ("attn_mask", TEXT_MODEL + "embeddings.position_ids")  # the latter in files of ComfyUI
RELEASED_LAYERS = 24  # of ViT-H-14


def from_openclip(tensors: Mapping[str, Tensor], *, projects: bool = False) -> tuple[Lazy, Lazy]:
    """Names after `model.` -> the text encoder under its own names, the UNUSED rest.

    projects: the projection is used (SDXL). Where it is not (SD 2.x), files made from diffusers folders lack
    the last of the RELEASED_LAYERS; it is copied from the one before.
    """
    unused = [name for name in UNUSED if not (projects and name == PROJECTION)]
    text_encoder: dict[str, Callable[[], Tensor]] = {}
    for name in tensors:
        layer, inner = _inside(name, BLOCK)
        if inner in FUSED:
            for row, own in enumerate(FUSED[inner]):
                text_encoder[f"{LAYER}{layer}.{own}"] = partial(_third, tensors, name, row)
        elif projects and name == f"{PROJECTION}.weight":  # of a linear layer, in some fine-tunes
            text_encoder[PROJECTION] = partial(_transposed, tensors, name)
        elif name not in (*unused, *BUFFERS):
            module, _, kind = inner.rpartition(".")
            inner = f"{LAYER}{layer}.{LAYER_TABLE.get(module, module)}.{kind}"
            text_encoder[inner if layer else TABLE.get(name, name)] = partial(tensors.__getitem__, name)
    rest = Lazy({name: partial(tensors.__getitem__, name) for name in unused if name in tensors})
    if not projects and len({_inside(name, BLOCK)[0] for name in tensors} - {""}) == RELEASED_LAYERS - 1:
        return with_last_layer(Lazy(text_encoder), {}, layers=RELEASED_LAYERS), rest
    return Lazy(text_encoder), rest


def to_openclip(
    text_encoder: Mapping[str, Tensor], rest: Mapping[str, Tensor], *, projects: bool = False
) -> dict[str, Tensor]:
    """The text encoder under OpenCLIP's names, with UNUSED from `rest`.

    If `rest` lacks them, they are the identity and the upper bound of CLIP's temperature. projects: the
    projection is the text encoder's own (SDXL).
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
    defaults = {"logit_scale": torch.tensor(math.log(100.0), dtype=positions.dtype)}
    if not projects:
        defaults[PROJECTION] = torch.eye(positions.shape[1], dtype=positions.dtype)
    return tensors | defaults | {name: rest[name] for name in UNUSED if name in rest}


def with_last_layer(text_encoder: Mapping[str, Tensor], rest: Mapping[str, Tensor], *, layers: int) -> Lazy:
    """The text encoder of a diffusers folder, which lacks the last of its `layers`, with that layer added.

    It is taken from `rest`, or else copied from the layer before: SD 2.x computes nothing with it.
    """
    make = {name: partial(text_encoder.__getitem__, name) for name in text_encoder}
    for name in text_encoder:
        layer, inner = _inside(name, LAYER)
        if layer == str(layers - 2):
            last = f"{LAYER}{layers - 1}.{inner}"
            make[last] = partial(rest.__getitem__, last) if last in rest else make[name]
    return Lazy(make)


def without_last_layer(text_encoder: Mapping[str, Tensor], *, layers: int) -> tuple[Lazy, Lazy]:
    """The text encoder without the last of its `layers`, as diffusers folders hold it, and that layer."""
    make = {name: partial(text_encoder.__getitem__, name) for name in text_encoder}
    last = {name for name in make if name.startswith(f"{LAYER}{layers - 1}.")}
    return tuple(Lazy({n: f for n, f in make.items() if (n in last) == wanted}) for wanted in (False, True))


def _inside(name: str, prefix: str) -> tuple[str, str]:
    """`transformer.resblocks.7.ln_1.bias` -> ("7", "ln_1.bias"); ("", name) outside the layers."""
    if not name.startswith(prefix):
        return "", name
    layer, _, inner = name.removeprefix(prefix).partition(".")
    return layer, inner


def _transposed(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    return tensors[name].T.contiguous()


def _third(tensors: Mapping[str, Tensor], name: str, row: int) -> Tensor:
    """Query, key or value (row 0, 1 or 2) of a fused tensor [3 D, ...]."""
    tensor = tensors[name]
    if tensor.ndim == 0 or len(tensor) % 3:
        raise UserError(f"`{name}` {list(tensor.shape)} is not query, key and value of one size")
    return tensor.chunk(3)[row]
