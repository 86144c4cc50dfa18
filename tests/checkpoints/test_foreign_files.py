"""Files as other tools and trainings leave them: read, or named as what they are; loaded or converted."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.checkpoints.ema import EMA_PREFIX, dotted
from ldm.checkpoints.load import open_model
from ldm.checkpoints.lora import read_lora, save_lora
from ldm.commands import convert
from ldm.config import instantiate
from ldm.errors import UserError
from ldm.model_file import ModelFile
from ldm.models.lora import LoRA
from ldm.models.unet import UNetModel

UNET = "model.diffusion_model."


def averages(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of LDM's EMA module, with its two numbers."""
    kept = {
        EMA_PREFIX + name.removeprefix("model.").replace(".", ""): x
        for name, x in tensors.items()
        if name.startswith(UNET)
    }
    numbers = {f"{EMA_PREFIX}decay": torch.tensor(0.9), f"{EMA_PREFIX}num_updates": torch.tensor(7)}
    return kept | numbers


def without_unet(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in tensors.items() if not name.startswith(UNET)}


FORMS = {  # how the tensors of a model are wrapped
    "state_dict.": lambda x: {f"state_dict.{name}": tensor for name, tensor in x.items()},
    "module.": lambda x: {f"module.{name}": tensor for name, tensor in x.items()},
    "model.": lambda x: {f"model.{name}": tensor for name, tensor in x.items()},
    "state_dict.module.": lambda x: {f"state_dict.module.{name}": tensor for name, tensor in x.items()},
    "torch.compile": lambda x: {
        name.replace(UNET, f"{UNET}_orig_mod."): tensor for name, tensor in x.items()
    },
    "a compiled whole": lambda x: {f"_orig_mod.{name}": tensor for name, tensor in x.items()},
    "nested": lambda x: {"state_dict": x, "epoch": 3},
    "doubly nested": lambda x: {"state_dict": {"state_dict": x}},
    "under model": lambda x: {"model": x, "optimizer": {"a": 1}},
    "under model_state_dict": lambda x: {"model_state_dict": {"module": x}},
    "EMA alone": lambda x: without_unet(x) | averages(x),
    "wrapped EMA alone": lambda x: {
        "state_dict": {f"module.{n}": t for n, t in (without_unet(x) | averages(x)).items()}
    },
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_wrapped_models_are_read(form, suffix, tiny_model_file, tiny_config, tiny_networks, tmp_path):
    content = FORMS[form](load_file(tiny_model_file))
    file = tmp_path / f"x.{suffix}"
    metadata = {"ldm.config": json.dumps(tiny_config)}
    if suffix == "ckpt":
        torch.save(content | {"metadata": metadata}, file)
    elif all(isinstance(value, Tensor) for value in content.values()):
        save_file(content, file, metadata=metadata)
    else:
        pytest.skip("safetensors files are flat")
    opened = ModelFile(file)
    opened.fill()
    for name, network in opened.networks.items():
        expected = tiny_networks[name].state_dict()
        assert all(torch.equal(x, expected[key]) for key, x in network.state_dict().items())


def test_two_tensors_under_one_name_are_refused(tiny_model_file, tmp_path):
    tensors = load_file(tiny_model_file)
    tensors[f"module.{UNET}out.2.bias"] = torch.ones(4)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="under two names"):
        open_model(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"num_head_channels": 64, "context_dim": 1024, "use_linear_in_transformer": True},
        {"model_channels": 64, "channel_mult": [1, 2], "num_res_blocks": 1, "transformer_depth": 12},
        {"model_channels": 64, "channel_mult": [1] * 5, "num_res_blocks": 6},
    ],
)
def test_dots_come_back_into_averages_names(params):
    with torch.device("meta"):
        names = list(UNetModel(**params).state_dict())
    flat = [EMA_PREFIX + "diffusion_model" + name.replace(".", "") for name in names]
    assert [dotted(name) for name in flat] == [f"{UNET}{name}" for name in names]
    assert dotted("model_ema.decay") is None and dotted("model_ema.diffusion_modelx1weight") is None


def scaled_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As ComfyUI scales: each weight by its largest value, with a scale beside it."""
    scaled = {"scaled_fp8": torch.zeros(1, dtype=torch.float8_e4m3fn)}
    for name, x in tensors.items():
        if name.startswith(UNET) and name.endswith(".weight") and x.ndim == 2:
            scale = x.abs().max() / 448
            scaled[name] = (x / scale).to(torch.float8_e4m3fn)
            scaled[name.replace(".weight", ".scale_weight")] = scale
        else:
            scaled[name] = x
    return scaled


FAULTS = {  # what is wrong with the tensors -> what says so
    "scaled fp8": (scaled_fp8, "weights are quantized"),
    "newer scales": (
        lambda x: x | {f"{UNET}out.2.weight_scale": torch.ones(1), f"{UNET}out.2.comfy_quant": torch.ones(1)},
        "weights are quantized",
    ),
    "a tensor is missing": (
        lambda x: {n: t for n, t in x.items() if n != f"{UNET}out.2.bias"},
        "lacks|missing",
    ),
    "a norm is missing": (
        lambda x: {n: t for n, t in x.items() if not n.endswith("middle_block.1.norm.weight")},
        r"unet: 1 missing \(middle_block.1.norm.weight\)",
    ),
    "int8 weights": (
        lambda x: {n: t.to(torch.int8) if "attn1.to_q" in n else t for n, t in x.items()},
        r"unet: \d+ not of floating-point numbers",
    ),
    "a tensor too many": (
        lambda x: x | {f"{UNET}out.3.bias": torch.ones(1)},
        r"unet: 1 unknown \(out.3.bias\)",
    ),
    "another shape": (lambda x: x | {f"{UNET}out.0.bias": torch.ones(5)}, r"unet: 1 of another shape"),
    "an empty tensor": (lambda x: x | {f"{UNET}out.2.bias": torch.ones(0)}, "no shape|another shape"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("target", ["out.safetensors", "out.ckpt", "out"])
def test_converting_checks_what_loading_checks(fault, target, tiny_model_file, tiny_config, tmp_path):
    change, message = FAULTS[fault]
    file = tmp_path / "x.safetensors"
    save_file(change(load_file(tiny_model_file)), file, metadata={"ldm.config": json.dumps(tiny_config)})
    with pytest.raises(UserError, match=message):
        ModelFile(file)
    with pytest.raises(UserError, match=message):
        convert.main(convert.parse([str(file), str(tmp_path / target)]))
    assert not (tmp_path / target).exists()


@pytest.fixture
def lora_file(tiny_model_file, tiny_config, tmp_path) -> Path:
    networks = {name: instantiate(tiny_config[name]) for name in ("unet", "text_encoder")}
    lora = LoRA(rank=2)
    lora.attach(networks)
    torch.manual_seed(3)
    for parameter in lora.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    parts = open_model(tiny_model_file).state_dicts
    return save_lora(tmp_path / "lora.safetensors", lora.weights(), parts, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16])
def test_a_lora_is_merged_into_low_precision(dtype, lora_file, tiny_model_file, tiny_config, tmp_path):
    """Each tensor stays in its own dtype, and is the nearest one to the exact sum."""
    tensors = load_file(tiny_model_file)
    low = {n: x.to(dtype) if n.startswith(UNET) and x.ndim > 1 else x for n, x in tensors.items()}
    save_file(low, tmp_path / "low.safetensors", metadata={"ldm.config": json.dumps(tiny_config)})
    words = [str(tmp_path / "low.safetensors"), str(tmp_path / "out.safetensors"), "--lora", str(lora_file)]
    merged = load_file(convert.main(convert.parse(words)))
    assert {n: merged[n].dtype for n in low} == {n: x.dtype for n, x in low.items()}
    layers = read_lora(lora_file, open_model(tmp_path / "low.safetensors").state_dicts)
    changed = 0
    for layer, (down, up, alpha) in layers["unet"].items():
        name = f"{UNET}{layer}.weight"
        exact = low[name].float() + (up @ down * (alpha / len(down))).reshape(low[name].shape)
        assert torch.equal(merged[name].float(), exact.to(dtype).float())
        changed += not torch.equal(merged[name].float(), low[name].float())
    assert changed == len(layers["unet"]) > 0
    words = [*words[:1], str(tmp_path / "full.safetensors"), *words[2:], "--dtype", "fp32"]
    full = load_file(convert.main(convert.parse(words)))
    assert {x.dtype for n, x in full.items() if n.startswith(UNET)} == {torch.float32}


LAYER = "lora_unet_mid_block_attentions_0_proj_in"
ADAPTERS = {  # name of a tensor that the kind has -> what the file is called
    f"{LAYER}.dora_scale": "a DoRA",
    "unet.mid_block.attentions.0.proj_in.lora_magnitude_vector": "a DoRA",
    "base_model.model.mid_block.attentions.0.proj_in.lora_magnitude_vector.weight": "a DoRA",
    f"{LAYER}.oft_blocks": "an OFT",
    f"{LAYER}.oft_diag": "an OFT",
    "base_model.model.mid_block.attentions.0.proj_in.oft_R.weight": "an OFT",
    "base_model.model.mid_block.attentions.0.proj_in.boft_R": "a BOFT",
    "base_model.model.mid_block.attentions.0.proj_in.ia3_l": r"an \(IA\)\^3",
    "base_model.model.mid_block.attentions.0.proj_in.hada_w1_a": "a LoHa of PEFT",
    "base_model.model.mid_block.attentions.0.proj_in.lokr_w2": "a LoKr of PEFT",
    f"{LAYER}.lora_mid.weight": "a LoCon with Tucker decomposition",
    f"{LAYER}.lambda_layer": "a T-LoRA",
    f"{LAYER}.q_layer.weight": "a T-LoRA",
    f"{LAYER}.diff": "a LyCORIS of whole differences",
    "unet.mid_block.attentions.0.proj_in.lora_B.bias": "a LoRA with biases",
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_other_adapters_are_called_by_their_kind(name, tiny_model_file, tmp_path):
    factors = {
        f"{LAYER}.lora_down.weight": torch.ones(2, 64, 1, 1),
        f"{LAYER}.lora_up.weight": torch.ones(64, 2, 1, 1),
    }
    save_file(factors | {name: torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=f"This is {ADAPTERS[name]}, not a plain LoRA.*x.safetensors"):
        read_lora(tmp_path / "x.safetensors", open_model(tiny_model_file).state_dicts)
    with pytest.raises(UserError, match=f"looks like {ADAPTERS[name]}"):
        open_model(tmp_path / "x.safetensors")


@pytest.mark.parametrize(("name", "kind"), [("hada_w1_a", "a LoHa"), ("lokr_w1", "a LoKr")])
def test_a_product_is_no_model(name: str, kind: str, tmp_path: Path):
    save_file({f"{LAYER}.{name}": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=f"not a Stable Diffusion model file, it looks like {kind}"):
        open_model(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("lora_te2_text_model_encoder_layers_0_self_attn_q_proj", "Stable Diffusion XL"),
        ("lora_unet_double_blocks_0_img_attn_proj", "a diffusion transformer"),
        ("lora_unet_joint_blocks_0_x_block_attn_proj", "Stable Diffusion 3"),
        ("lora_unet_no_such_layer", None),
    ],
)
def test_loras_of_other_families(name, family, tiny_model_file, tmp_path):
    save_file({f"{name}.lora_down.weight": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    message = f"a LoRA for {family}" if family else "is not a key of a LoRA of this model"
    with pytest.raises(UserError, match=message):
        read_lora(tmp_path / "x.safetensors", open_model(tiny_model_file).state_dicts)
