"""Params of networks that the shapes of their tensors determine: widths, levels, blocks."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

TEXT_MODEL = "transformer.text_model."
LAYER = TEXT_MODEL + "encoder.layers."
# Of CLIP-L's other half, which ComfyUI and merging tools keep in files; no diffusion model uses it
CLIP_UNUSED = (
    "logit_scale",
    "text_projection",
    "text_projection.weight",
    "transformer.text_projection.weight",
    TEXT_MODEL + "text_projection.weight",
)


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
    vector = unet.get("label_emb.0.0.weight")
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
        "transformer_depth": _depth(unet, firsts, count_names(unet, middle)),
        "use_linear_in_transformer": unet["middle_block.1.proj_in.weight"].ndim == 2,
    } | ({} if vector is None else {"adm_in_channels": vector.shape[1]})


def _depth(unet: Mapping[str, Tensor], firsts: list[str], middle: int) -> int | list[int]:
    """Blocks of the transformers: one number, or that of each level, 1 where it has none."""
    depths = [count_names(unet, f"{first}.1.transformer_blocks.") for first in firsts]
    if depths[-1] not in (0, middle):
        raise ValueError("the middle is not as deep as the last level")
    depths[-1] = middle
    return middle if set(depths) <= {0, middle} else [depth or 1 for depth in depths]


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
    projection = text_encoder.get("text_projection")
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": len(text_encoder[f"{LAYER}0.mlp.fc1.bias"]),
        "num_hidden_layers": count_names(text_encoder, LAYER),
        "max_length": len(text_encoder[f"{embeddings}position_embedding.weight"]),
    } | ({} if projection is None else {"projection_dim": projection.shape[1]})


def count_names(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Number of different names that follow a prefix, as in `prefix`0, `prefix`1, ..."""
    return len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})
