"""SDXL at true size, on the meta device, against the rules by which other programs recognize and open it.

The rules are those of the loaders that ComfyUI, kohya's scripts, AUTOMATIC1111 and diffusers publish.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ldm.checkpoints.layout import join
from ldm.checkpoints.lora import save_lora
from ldm.models.lora import LoRA
from tests.families.sdxl_base import CLIP_G, CLIP_L, UNET
from tests.families.test_sdxl_true_size import true_size_networks

BLOCKS = CLIP_G + "transformer.resblocks."


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    return true_size_networks()


@pytest.fixture(scope="module")
def file(networks: dict[str, nn.Module]) -> dict[str, Tensor]:
    return join({name: network.state_dict() for name, network in networks.items()}, torch.rand(1000))


def depths(file: dict[str, Tensor], side: str, blocks: range) -> list[int]:
    """Transformer blocks in each block of a side."""
    prefixes = [f"{UNET}{side}.{block}.1.transformer_blocks." for block in blocks]
    return [len({n.removeprefix(p).split(".")[0] for n in file if n.startswith(p)}) for p in prefixes]


def test_comfyui_takes_it_for_sdxl_base(file):
    """By the UNet alone: width, context, vector, linear projections, and the depth at each block."""
    assert file[UNET + "input_blocks.0.0.weight"].shape == (320, 4, 3, 3)
    assert file[UNET + "label_emb.0.0.weight"].shape[1] == 2816
    first = UNET + "input_blocks.4.1."
    assert file[first + "transformer_blocks.0.attn2.to_k.weight"].shape[1] == 2048
    assert file[first + "proj_in.weight"].dim() == 2
    residual = [block for block in range(1, 9) if f"{UNET}input_blocks.{block}.0.op.weight" not in file]
    found = [depth for block in residual for depth in depths(file, "input_blocks", range(block, block + 1))]
    assert found == [0, 0, 2, 2, 10, 10] and f"{UNET}input_blocks.9.0.op.weight" not in file
    assert depths(file, "output_blocks", range(9)) == [10, 10, 10, 2, 2, 2, 0, 0, 0]
    middle = UNET + "middle_block.1.transformer_blocks."
    assert {n.removeprefix(middle).split(".")[0] for n in file if n.startswith(middle)} == set("0123456789")
    marks = ("edm_mean", "edm_vpred.sigma_max", "v_pred", "ztsnr")  # of other noise processes
    assert not any(mark in file for mark in marks)


def test_diffusers_and_the_web_ui_take_it_for_sdxl_base(file):
    """By one tensor of the second text encoder, which the refiner has in the first one's place."""
    for name in ("transformer.resblocks.9.mlp.c_proj.bias", "ln_final.weight"):
        assert CLIP_G + name in file
        assert f"conditioner.embedders.0.model.{name}" not in file


def places_of_clip_g(layers: int) -> dict[str, tuple[str, ...]]:
    """OpenCLIP's name, as both loaders look for it -> where it goes in transformers' network."""
    places: dict[str, tuple[str, ...]] = {
        "token_embedding.weight": ("embeddings.token_embedding.weight",),
        "positional_embedding": ("embeddings.position_embedding.weight",),
        "ln_final.weight": ("final_layer_norm.weight",),
        "ln_final.bias": ("final_layer_norm.bias",),
        "text_projection": ("text_projection.weight",),
    }
    inner = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    inner |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for layer in range(layers):
        here, there = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
        for end in ("weight", "bias"):
            places |= {f"{here}.{own}.{end}": (f"{there}.{other}.{end}",) for own, other in inner.items()}
            thirds = tuple(f"{there}.self_attn.{part}_proj.{end}" for part in "qkv")
            places[f"{here}.attn.in_proj_{end}"] = thirds
    return places


def transformers_shapes(kind: type[nn.Module], **sizes: int) -> dict[str, torch.Size]:
    """Without the level `text_model`, which transformers 5 has no more."""
    with torch.device("meta"):
        network = kind(CLIPTextConfig(**sizes))
    return {name.removeprefix("text_model."): t.shape for name, t in network.state_dict().items()}


def test_the_second_text_encoder_fills_transformers_exactly(file):
    """ComfyUI and kohya's scripts rename it: none is missing, none is left but CLIP's logit scale."""
    own = {name.removeprefix(CLIP_G): t for name, t in file.items() if name.startswith(CLIP_G)}
    places = places_of_clip_g(32)
    assert own.keys() - places.keys() == {"logit_scale"} and places.keys() <= own.keys()
    sizes = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "projection_dim": 1280}
    wanted = transformers_shapes(CLIPTextModelWithProjection, num_attention_heads=20, **sizes)
    found = {
        name: part.shape
        for key, names in places.items()
        for name, part in zip(names, own[key].chunk(len(names)), strict=True)
    }
    assert found == wanted and len(wanted) == 517


def test_the_first_text_encoder_has_transformers_names(file):
    """Kohya's loader drops the position ids and is strict with all others."""
    own = {name.removeprefix(CLIP_L): t.shape for name, t in file.items() if name.startswith(CLIP_L)}
    assert own.pop("embeddings.position_ids") == (1, 77)
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    assert own == transformers_shapes(CLIPTextModel, num_attention_heads=12, **sizes)


def test_loras_have_the_keys_that_all_of_them_patch(networks, file, tmp_path: Path):
    """Kohya's 722 layers of the UNet under SGM's names, those of both encoders that act; fused qkv is split.

    ComfyUI and the web UI look for `lora_unet_` and the UNet's own name with underscores, and for
    `lora_te1_`, `lora_te2_` with the name that transformers has.
    """
    unet, text = networks["unet"].requires_grad_(True), networks["text_encoder"].requires_grad_(True)
    lora = LoRA(
        rank=1,
        unet=["attention", "feed_forward", "projections"],
        text_encoder=["attention", "feed_forward"],
    )
    lora.attach({"unet": unet, "text_encoder": text})
    parts = {name: network.state_dict() for name, network in networks.items()}
    written = load_file(save_lora(tmp_path / "lora.safetensors", lora.weights(), parts))
    layers = {key.partition(".")[0] for key in written}
    assert {key.partition(".")[2] for key in written} == {"lora_down.weight", "lora_up.weight", "alpha"}
    inside = (".transformer_blocks.", ".1.proj_in.", ".1.proj_out.")
    linear = [n for n in file if n.startswith(UNET) and n.endswith(".weight") and any(i in n for i in inside)]
    names = [n.removeprefix(UNET).removesuffix(".weight") for n in linear if ".norm" not in n]
    wanted = {"lora_unet_" + name.replace(".", "_") for name in names}
    ends = [f"self_attn_{part}_proj" for part in ("q", "k", "v", "out")] + ["mlp_fc1", "mlp_fc2"]
    for prefix, count in (("lora_te1", 11), ("lora_te2", 32)):  # CLIP-L's last layer acts on nothing
        wanted |= {f"{prefix}_text_model_encoder_layers_{n}_{end}" for n in range(count) for end in ends}
    assert len(names) == 722 and layers == wanted
