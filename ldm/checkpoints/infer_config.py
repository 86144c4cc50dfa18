"""Infers the config of a model from the shapes of its tensors.

Shapes determine widths, levels and blocks. What they do not determine (numbers of heads, activations,
prediction type) comes from the file's own config or else from its family, Stable Diffusion 1.x or 2.x.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ldm.checkpoints.layout import is_sd2
from ldm.checkpoints.openclip import LAYER, TEXT_MODEL
from ldm.errors import UserError

StateDicts = Mapping[str, Mapping[str, Tensor]]
SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "linear_start": 0.00085,
    "linear_end": 0.012,
    "timesteps": 1000,
    "zero_terminal_snr": False,
}
SD1 = {  # params that shapes do not determine
    "unet": {"num_heads": 8, "num_head_channels": None, "num_groups": 32},
    "vae": {"scale_factor": 0.18215, "num_groups": 32},
    "text_encoder": {
        "num_attention_heads": 12,
        "hidden_act": "quick_gelu",
        "layer": "last",
        "tokenizer": "openai/clip-vit-large-patch14",
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": None,
    },
}
SD2 = SD1 | {
    "unet": SD1["unet"] | {"num_head_channels": 64},
    "text_encoder": SD1["text_encoder"]
    | {"num_attention_heads": 16, "hidden_act": "gelu", "layer": "penultimate", "pad_token_id": 0},
}
KNOWN_FAMILIES = {  # (width of the UNet's first level, of its context) -> what it is, and a config for it
    (320, 768): ("Stable Diffusion 1.x", "configs/dreambooth-sd1.yaml"),
    (320, 1024): ("Stable Diffusion 2.x", "configs/dreambooth-sd2.yaml"),
}
MOST = 2**20  # of any size in a network
V_PREDICTION_STD = 0.09  # std of a norm's bias in SD 2.x: larger in v-prediction models, smaller in eps

logger = logging.getLogger(__name__)


def model_config(state_dicts: StateDicts, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The params of a model section for these tensors: networks with every param explicit, and schedule.

    known: what the file's metadata or the folder's configs say of them; any key may be missing. Raises
    UserError if a network is incomplete, or unknown and not described.
    """
    known = known or {}
    config: dict[str, Any] = {}
    for name, (target, shape) in NETWORKS.items():
        params = _shape_of(state_dicts, name, shape)
        node = known.get(name)
        if node is None and known_family(state_dicts["unet"]) is None:
            what = (
                "The file does not say which networks it holds, and they are not Stable Diffusion 1.x or 2.x"
            )
            raise UserError(what, remedy="Give the config it was trained with.")
        untold = (SD2 if is_sd2(state_dicts) and node is None else SD1)[name]
        given = (node or {}).get("params") or {}
        params |= untold | {key: value for key, value in given.items() if key in untold}
        config[name] = {"target": target, "params": params}
    config |= {key: known.get(key, value) for key, value in SCHEDULE.items()}
    parameterization = known.get("parameterization") or infer_prediction_type(state_dicts)
    return config | {"parameterization": parameterization}


def _shape_of(
    state_dicts: StateDicts, name: str, shape: Callable[[Mapping[str, Tensor]], dict[str, Any]]
) -> dict[str, Any]:
    """The params that the shapes of a network's tensors determine."""
    try:
        params = shape(state_dicts[name])
    except KeyError as error:
        remedy = "A VAE of the family completes it: --vae FILE." if name == "vae" else None
        raise UserError(f"The file is not a whole model: its {name} lacks {error}", remedy=remedy) from error
    except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:
        what = f"The {name} in the file has no shape that a network of Stable Diffusion has"
        raise UserError(what) from error
    sizes = [n for value in params.values() for n in (value if isinstance(value, list) else [value])]
    if not all(0 < n <= MOST for n in sizes if not isinstance(n, bool)):
        raise UserError(f"The {name} in the file has no shape that a network of Stable Diffusion has")
    return params


def known_family(unet: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """(family, config file for it) of a UNet with the widths of a released one; None for others."""
    conv_in = unet.get("input_blocks.0.0.weight")
    to_k = unet.get("middle_block.1.transformer_blocks.0.attn2.to_k.weight")
    if conv_in is None or to_k is None or conv_in.ndim != 4 or to_k.ndim != 2:
        return None
    return KNOWN_FAMILIES.get((len(conv_in), to_k.shape[1]))


def infer_prediction_type(state_dicts: StateDicts) -> str:
    """ "eps" or "v", for a file that does not say. SD 1.x is "eps"; for SD 2.x the weights decide."""
    name = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
    if not is_sd2(state_dicts) or name not in state_dicts["unet"]:
        return "eps"
    guess = "v" if state_dicts["unet"][name].float().std() > V_PREDICTION_STD else "eps"
    logger.warning("The file has no prediction type; by its weights it is %r", guess)
    return guess


def unet_shape(unet: Mapping[str, Tensor]) -> dict[str, Any]:
    """The params of `UNetModel` that the shapes of its tensors determine."""
    levels = 1 + sum(name.startswith("input_blocks.") and name.endswith(".op.weight") for name in unet)
    blocks = 1 + max(int(name.split(".")[1]) for name in unet if name.startswith("input_blocks."))
    if blocks != count_names(unet, "input_blocks."):
        raise ValueError("a block is missing")
    stride = blocks // levels  # one more than the residual blocks of a level
    firsts = [f"input_blocks.{1 + level * stride}" for level in range(levels)]
    conv_in = unet["input_blocks.0.0.weight"]
    width, channels = conv_in.shape[:2]
    middle = "middle_block.1.transformer_blocks."
    return {
        "in_channels": channels,
        "out_channels": len(unet["out.2.bias"]),
        "model_channels": width,
        "channel_mult": [len(unet[f"{first}.0.out_layers.3.bias"]) // width for first in firsts],
        "num_res_blocks": stride - 1,
        "attention_resolutions": [
            2**level for level, first in enumerate(firsts) if f"{first}.1.norm.weight" in unet
        ],
        "context_dim": unet[f"{middle}0.attn2.to_k.weight"].shape[1],
        "transformer_depth": count_names(unet, middle),
        "use_linear_in_transformer": unet["middle_block.1.proj_in.weight"].ndim == 2,
    }


def autoencoder_shape(vae: Mapping[str, Tensor]) -> dict[str, Any]:
    """The params of `AutoencoderKL` that the shapes of its tensors determine."""
    levels = count_names(vae, "encoder.down.")
    width, channels = vae["encoder.conv_in.weight"].shape[:2]
    widths = [len(vae[f"encoder.down.{level}.block.0.conv1.bias"]) for level in range(levels)]
    return {
        "in_channels": channels,
        "z_channels": len(vae["post_quant_conv.bias"]),
        "ch": width,
        "ch_mult": [w // width for w in widths],
        "num_res_blocks": count_names(vae, "encoder.down.0.block."),
        "embed_dim": vae["post_quant_conv.weight"].shape[1],
    }


def text_encoder_shape(text_encoder: Mapping[str, Tensor]) -> dict[str, Any]:
    """The params of `CLIPTextEncoder` that the shapes of its tensors determine."""
    embeddings = TEXT_MODEL + "embeddings."
    vocab_size, width = text_encoder[f"{embeddings}token_embedding.weight"].shape
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": len(text_encoder[f"{LAYER}0.mlp.fc1.bias"]),
        "num_hidden_layers": count_names(text_encoder, LAYER),
        "max_length": len(text_encoder[f"{embeddings}position_embedding.weight"]),
    }


def count_names(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Number of different names that follow a prefix, as in `prefix`0, `prefix`1, ..."""
    return len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})


NETWORKS = {  # part -> its class, and the function that reads its shapes
    "unet": ("ldm.models.unet.UNetModel", unet_shape),
    "vae": ("ldm.models.autoencoder.AutoencoderKL", autoencoder_shape),
    "text_encoder": ("ldm.models.text_encoder.CLIPTextEncoder", text_encoder_shape),
}
