"""How tools name the tensors of LoRA files, and by which signs files of other adapters are told apart."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ldm.checkpoints.products import NAMES
from ldm.families.sdxl.family import ENCODERS

NETWORK_PREFIXES = {"unet": ("lora_unet_", "unet."), "text_encoder": ("lora_te_", "text_encoder.")}
SDXL_PREFIXES = {  # by the beginning of a layer's name in SDXL's text encoders
    ENCODERS["clip_l"]: ("lora_te1_", "text_encoder."),
    ENCODERS["clip_g"]: ("lora_te2_", "text_encoder_2."),
}
SECOND = "text_encoder_2"  # stands for the second text encoder of SDXL while names are read
READ_PREFIXES = {  # diffusers' converter to kohya's keys has a 1 for SD too
    "unet": NETWORK_PREFIXES["unet"],
    "text_encoder": (*NETWORK_PREFIXES["text_encoder"], "lora_te1_"),
    SECOND: SDXL_PREFIXES[ENCODERS["clip_g"]],
}
PEFT_PREFIX = "base_model.model."  # of PEFT's own files, which hold one network
LYCORIS_PREFIX = "lycoris_"  # of the LyCORIS library's wrapper around any one network
ENDS = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",  # names in memory of PEFT's layers
    ".lora_B.default.weight": "up",
    ".lora_linear_layer.down.weight": "down",  # diffusers before PEFT, text encoder
    ".lora_linear_layer.up.weight": "up",
    ".lora.down.weight": "down",  # the same, UNet
    ".lora.up.weight": "up",
    ".lora.alpha": "alpha",
} | {f".{name}": name for name in NAMES}
PROCESSOR = re.compile(r"(?:\.processor)?\.to_([qkv]|out)_lora\.")  # diffusers before 0.18
TEXT_LEVELS = ("transformer_", "text_model_")  # some tools leave out levels before the text encoder's names
PRODUCTS = {r"\.hada_w": "a LoHa", r"\.lokr_w": "a LoKr"}  # sign in a tensor's name -> what the file is
OTHER_ADAPTERS = {  # the same for adapters that are not read
    r"^base_model\..*\.hada_w": "a LoHa of PEFT",  # whose config has another form
    r"^base_model\..*\.lokr_w": "a LoKr of PEFT",
    r"\.(dora_scale|lora_magnitude_vector)": "a DoRA",
    r"\.(oft_blocks|oft_diag|oft_[rR]\b|oft_s\b)": "an OFT",
    r"\.boft_": "a BOFT",
    r"\.(ia3_l|on_input$)": "an (IA)^3",
    r"\.vera_lambda": "a VeRA",
    r"\.[ab][12]\.weight$": "a GLoRA",
    r"\.(q_layer|p_layer|lambda_layer)\b": "a T-LoRA",
    r"\.lora_mid\.": "a LoCon with Tucker decomposition",
    r"\.(diff|diff_b|w_norm|b_norm)$": "a LyCORIS of whole differences",
    r"\.lora_B\.(default\.)?bias$": "a LoRA with biases",
}
OTHER_FAMILIES = {  # the same for a LoRA of another family
    r"^(lora_te2_|text_encoder_2\.)": "Stable Diffusion XL",
    r"^(lora_unet_(double|single)_blocks|transformer\.|lora_transformer_)": "a diffusion transformer",
    r"joint_(transformer_)?blocks": "Stable Diffusion 3",
}


class LoRAKey(NamedTuple):
    """A tensor's place: network (None if the name does not say), name of the layer, kind of tensor.

    kind: "down", "up", "alpha" or a name of `products`. layer: under diffusers' or SD's names, with dots or,
    in kohya's files, with underscores.
    """

    network: str | None
    layer: str
    kind: str


def written_prefix(network: str, layer: str, *, kohya: bool) -> str:
    """What a layer's name begins with in a LoRA file. layer: SD's name."""
    prefixes = next((p for start, p in SDXL_PREFIXES.items() if layer.startswith(start)), None)
    return (prefixes or NETWORK_PREFIXES[network])[0 if kohya else 1]


def lora_key(name: str) -> LoRAKey | None:
    """What a tensor of a LoRA file is; None for one that no plain LoRA has."""
    spelt = PROCESSOR.sub(r".to_\1.lora.", name)
    end = next((end for end in ENDS if spelt.endswith(end)), None)
    if end is None:
        return None
    module = spelt.removesuffix(end).removeprefix(PEFT_PREFIX)
    network = None
    for each, prefixes in READ_PREFIXES.items():
        prefix = next((prefix for prefix in prefixes if module.startswith(prefix)), None)
        if prefix is not None:
            network, module = each, module.removeprefix(prefix)
    module = module.removeprefix(LYCORIS_PREFIX)
    module = re.sub(r"self_attn\.to_([qkv]|out)$", r"self_attn.\1_proj", module)
    if module.endswith(".to_out"):
        module += ".0"
    return LoRAKey(network, module, ENDS[end])


def layer_places(names: Mapping[str, Mapping[str, str]]) -> dict[tuple[str, str], tuple[str, str]]:
    """(network, comparable name) -> (network, SD's name of the layer). names: SD's name -> diffusers'."""
    places = {}
    for network, inner in names.items():
        for own, theirs in inner.items():
            for spelt in (own, theirs):  # some files of kohya's style have SD's own names
                places[network, comparable(spelt)] = network, own
    return places


def comparable(layer: str) -> str:
    """A layer's name in the one form that all spellings of it share: underscores, without outer levels."""
    name = layer.replace(".", "_")
    for level in TEXT_LEVELS:
        name = name.removeprefix(level)
    return name


def other_adapter(names: Iterable[str]) -> str | None:
    """The kind of adapter that the names of tensors tell of, if no file of it is read."""
    return _told(names, OTHER_ADAPTERS)


def any_adapter(names: Iterable[str]) -> str | None:
    """The kind of adapter that the names of tensors tell of, if it is no plain LoRA."""
    return _told(names, OTHER_ADAPTERS | PRODUCTS)


def other_family(names: Iterable[str]) -> str | None:
    """The family of models that a LoRA is for, if that is neither Stable Diffusion 1.x nor 2.x."""
    return _told(names, OTHER_FAMILIES)


def _told(names: Iterable[str], signs: Mapping[str, str]) -> str | None:
    """What the first sign says that is in any of the names."""
    names = list(names)
    return next((what for sign, what in signs.items() if any(re.search(sign, name) for name in names)), None)
