"""Key tables between Stable Diffusion's names and those of diffusers folders, used both ways.

A table maps modules, SD's name -> diffusers' name; tensors below a module keep the rest of their names.
Tables are computed from the params of a network, so they fit any depth and number of levels.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from ldm.lazy import Lazy

RES_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLD_VAE_ATTENTION = {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}  # before diffusers 0.13
VAE_MIDDLE = {
    "block_1": "mid_block.resnets.0",
    "block_2": "mid_block.resnets.1",
    "attn_1": "mid_block.attentions.0",
}


def unet_table(params: Mapping[str, Any]) -> dict[str, str]:
    """Table of `UNetModel`. SD numbers blocks consecutively, diffusers within each level."""
    levels, blocks = len(params["channel_mult"]), params["num_res_blocks"]
    attends = [2**level in params["attention_resolutions"] for level in range(levels)]
    table = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.1": "mid_block.attentions.0",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    res_blocks = {f"middle_block.{2 * j}": f"mid_block.resnets.{j}" for j in range(2)}
    for level in range(levels):
        first = 1 + level * (blocks + 1)
        for j in range(blocks):
            res_blocks[f"input_blocks.{first + j}.0"] = f"down_blocks.{level}.resnets.{j}"
            if attends[level]:
                table[f"input_blocks.{first + j}.1"] = f"down_blocks.{level}.attentions.{j}"
        if level < levels - 1:
            table[f"input_blocks.{first + blocks}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        first, up = level * (blocks + 1), f"up_blocks.{level}"
        attending = attends[levels - 1 - level]
        for j in range(blocks + 1):
            res_blocks[f"output_blocks.{first + j}.0"] = f"{up}.resnets.{j}"
            if attending:
                table[f"output_blocks.{first + j}.1"] = f"{up}.attentions.{j}"
        if level < levels - 1:
            table[f"output_blocks.{first + blocks}.{1 + attending}.conv"] = f"{up}.upsamplers.0.conv"
    for ours, theirs in res_blocks.items():
        table |= {f"{ours}.{a}": f"{theirs}.{b}" for a, b in RES_BLOCK.items()}
    return table


def autoencoder_table(params: Mapping[str, Any]) -> dict[str, str]:
    """Table of `AutoencoderKL`. SD numbers the levels of the decoder from the finest one."""
    levels, blocks = len(params["ch_mult"]), params["num_res_blocks"]
    table = {name: name for name in ("quant_conv", "post_quant_conv")}
    for half in ("encoder", "decoder"):
        table |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        table[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        for ours, theirs in VAE_MIDDLE.items():
            table[f"{half}.mid.{ours}"] = f"{half}.{theirs}"
        for ours, theirs in VAE_ATTENTION.items():
            table[f"{half}.mid.attn_1.{ours}"] = f"{half}.mid_block.attentions.0.{theirs}"
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        for j in range(blocks + 1):
            if j < blocks:
                table |= _vae_block(f"encoder.down.{level}.block.{j}", f"{down}.resnets.{j}")
            table |= _vae_block(f"decoder.up.{level}.block.{j}", f"{up}.resnets.{j}")
        if level < levels - 1:
            table[f"encoder.down.{level}.downsample.conv"] = f"{down}.downsamplers.0.conv"
        if level > 0:
            table[f"decoder.up.{level}.upsample.conv"] = f"{up}.upsamplers.0.conv"
    return table


def rename(tensors: Mapping[str, Tensor], table: Mapping[str, str]) -> Lazy:
    """Tensors under the names that a table gives their modules; others keep theirs."""
    return Lazy({_renamed(name, table): partial(tensors.__getitem__, name) for name in tensors})


def inverse(table: Mapping[str, str]) -> dict[str, str]:
    """The table for the other direction."""
    return {theirs: ours for ours, theirs in table.items()}


def autoencoder_reading_table(params: Mapping[str, Any]) -> dict[str, str]:
    """Table of `AutoencoderKL` from diffusers' names, those before 0.13 included, to SD's."""
    old = {
        f"{half}.mid_block.attentions.0.{theirs}": f"{half}.mid.attn_1.{ours}"
        for half in ("encoder", "decoder")
        for ours, theirs in OLD_VAE_ATTENTION.items()
    }
    return inverse(autoencoder_table(params)) | old


def reshape_vae_attention(tensors: Mapping[str, Tensor], *, dims: int) -> Lazy:
    """The VAE's attention weights, under SD's names, as 1x1 convolutions (dims 4) or matrices (dims 2)."""

    def take(name: str) -> Tensor:
        tensor = tensors[name]
        projects = ".attn_1." in name and name.endswith(".weight") and tensor.ndim > 1
        projects = projects and tensor.shape[2:].numel() == 1
        return tensor.reshape(*tensor.shape[:2], *[1] * (dims - 2)) if projects else tensor

    return Lazy({name: partial(take, name) for name in tensors})


def _vae_block(ours: str, theirs: str) -> dict[str, str]:
    inner = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in inner.items()}


def _renamed(name: str, table: Mapping[str, str]) -> str:
    """Renames by the longest module of the table that is a prefix of the name."""
    words = name.split(".")
    for n in range(len(words) - 1, 0, -1):
        module = ".".join(words[:n])
        if module in table:
            return ".".join([table[module], *words[n:]])
    return name
