"""LoRA files that peft and diffusers write, read here: the same prediction as in their own libraries."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.checkpoints.load import open_model
from ldm.checkpoints.lora import Layers, read_lora
from ldm.checkpoints.save_folder import save_folder
from ldm.errors import UserError
from ldm.model_file import ModelFile
from ldm.models.conditioning import Conditioning

TOLERANCE = 1e-5  # of the largest output, float32
UNET_LAYERS = ["to_q", "to_v", "to_out.0", "ff.net.2", "conv1", "proj_in"]
TEXT_LAYERS = ["q_proj", "v_proj", "out_proj", "fc1"]
SCALES: dict[str, dict[str, Any]] = {
    "alpha above the rank": {"r": 4, "lora_alpha": 16},
    "alpha of the rank": {"r": 4, "lora_alpha": 4},
    "rank-stabilized": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "ranks and alphas of some layers": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"to_v": 2, "fc1": 3},
        "alpha_pattern": {"to_v": 5, "attn2.to_q": 3, "fc1": 1},
    },
}
PROMPT = "a photo of sks disc"


@pytest.fixture
def pipe(tiny_model_file: Path, tiny_tokenizer: Path, tmp_path: Path) -> StableDiffusionPipeline:
    """The tiny model in diffusers."""
    model = open_model(tiny_model_file)
    how = {"config": model.config, "tokenizer": tiny_tokenizer, "size": 16}
    folder = save_folder(tmp_path / "diffusers", model.state_dicts, **how)
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


def adapted(pipe: StableDiffusionPipeline, scale: dict[str, Any], *, text: bool = True) -> None:
    """Adds random LoRAs to both networks."""
    torch.manual_seed(2)
    pipe.unet.add_adapter(LoraConfig(target_modules=UNET_LAYERS, init_lora_weights=False, **scale))
    if text:
        pipe.text_encoder.add_adapter(
            LoraConfig(target_modules=TEXT_LAYERS, init_lora_weights=False, **scale)
        )


def states(pipe: StableDiffusionPipeline) -> dict[str, dict[str, Tensor]]:
    networks = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    return {name: get_peft_model_state_dict(network) for name, network in networks.items()}


@torch.no_grad()
def theirs(pipe: StableDiffusionPipeline) -> Tensor:
    torch.manual_seed(1)
    x = torch.randn(2, 4, 8, 8)
    ids = pipe.tokenizer([PROMPT] * 2, padding="max_length", max_length=32, return_tensors="pt").input_ids
    return pipe.unet(x, torch.tensor([1, 801]), pipe.text_encoder(ids)[0]).sample


@torch.no_grad()
def ours(model: Path, lora: Path | None) -> Tensor:
    torch.manual_seed(1)
    x = torch.randn(2, 4, 8, 8)
    file = ModelFile(model)
    file.fill(loras=[] if lora is None else [(lora, 1.0)])
    text_encoder = file.networks["text_encoder"]
    context = text_encoder(text_encoder.tokenize([PROMPT] * 2))
    return file.networks["unet"].predict(x, torch.tensor([1, 801]), Conditioning.of(context))


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def by_diffusers(pipe: StableDiffusionPipeline, folder: Path) -> Path:
    parts = states(pipe)
    pipe.save_lora_weights(
        folder,
        unet_lora_layers=parts["unet"],
        text_encoder_lora_layers=parts["text_encoder"],
        unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
        text_encoder_lora_adapter_metadata=pipe.text_encoder.peft_config["default"].to_dict(),
    )
    return folder / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("scale", SCALES)
def test_alpha_stands_in_the_header_of_diffusers(scale, pipe, tiny_model_file, tmp_path):
    adapted(pipe, SCALES[scale])
    file = by_diffusers(pipe, tmp_path / "lora")
    expected = theirs(pipe)
    assert relative(ours(tiny_model_file, file), expected) < TOLERANCE
    assert relative(ours(tiny_model_file, None), expected) > 100 * TOLERANCE
    if scale != "alpha of the rank":  # the header is what makes the difference
        save_file(load_file(file), file)
        assert relative(ours(tiny_model_file, file), expected) > 100 * TOLERANCE


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("network", ["unet", "text_encoder"])
def test_a_folder_of_peft_holds_one_network(scale, network, pipe, tiny_model_file, tmp_path):
    torch.manual_seed(2)
    layers = UNET_LAYERS if network == "unet" else TEXT_LAYERS
    config = LoraConfig(target_modules=layers, init_lora_weights=False, **SCALES[scale])
    get_peft_model(getattr(pipe, network), config).save_pretrained(tmp_path / "lora")
    expected = theirs(pipe)
    assert relative(ours(tiny_model_file, None), expected) > 100 * TOLERANCE
    for path in (tmp_path / "lora", tmp_path / "lora" / "adapter_model.safetensors"):
        assert relative(ours(tiny_model_file, path), expected) < TOLERANCE
    (tmp_path / "lora" / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"alpha of this LoRA stands in adapter_config\.json"):
        ours(tiny_model_file, tmp_path / "lora" / "adapter_model.safetensors")


def test_a_network_s_own_adapter_file(pipe, tiny_model_file, tmp_path):
    """Its header has no name of a network before its keys."""
    adapted(pipe, SCALES["rank-stabilized"], text=False)
    pipe.unet.save_lora_adapter(tmp_path / "lora")
    (file,) = (tmp_path / "lora").glob("*.safetensors")
    assert relative(ours(tiny_model_file, file), theirs(pipe)) < TOLERANCE


def older(parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """diffusers 0.17 to 0.22: `lora.down` in the UNet, `lora_linear_layer.down` in the text encoder."""
    return {
        f"{name}.{key}": tensor
        for name, tensors in parts.items()
        for key, tensor in convert_state_dict_to_diffusers(tensors).items()
    }


def processors(parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """diffusers 0.12 to 0.16: LoRA as attention processors, of the UNet's attention alone."""
    renamed = {}
    for key, tensor in older({"unet": parts["unet"]}).items():
        for layer in ("to_q", "to_k", "to_v", "to_out"):
            full = f".{layer}.0.lora." if layer == "to_out" else f".{layer}.lora."
            if full in key:
                renamed[key.removeprefix("unet.").replace(full, f".processor.{layer}_lora.")] = tensor
    return renamed


def transformers_4(parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The text encoder with the level `text_model`, which transformers 5 has no more."""
    text = {f"text_encoder.text_model.{key}": x for key, x in parts["text_encoder"].items()}
    return {f"unet.{key}": x for key, x in parts["unet"].items()} | text


def transformers_5(parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    assert not any("text_model" in key for key in parts["text_encoder"])
    return {f"{name}.{key}": x for name, tensors in parts.items() for key, x in tensors.items()}


def kohya(parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """diffusers' own converter to kohya's keys, alphas included."""
    return convert_state_dict_to_kohya(transformers_4(parts))


@pytest.mark.parametrize("spelling", [older, transformers_4, transformers_5, kohya])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_spellings_of_other_versions(spelling: Callable, suffix, pipe, tiny_model_file, tmp_path):
    adapted(pipe, SCALES["alpha of the rank"])
    file = tmp_path / f"lora.{suffix}"
    tensors = {key: tensor.clone().contiguous() for key, tensor in spelling(states(pipe)).items()}
    save_file(tensors, file) if suffix == "safetensors" else torch.save(tensors, file)
    assert relative(ours(tiny_model_file, file), theirs(pipe)) < TOLERANCE


def test_attention_processors(pipe, tiny_model_file, tmp_path):
    scale = SCALES["alpha of the rank"]
    torch.manual_seed(2)
    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.unet.add_adapter(LoraConfig(target_modules=layers, init_lora_weights=False, **scale))
    parts = {"unet": get_peft_model_state_dict(pipe.unet)}
    tensors = processors(parts)
    assert len(tensors) == len(parts["unet"]) and all(".processor.to_" in key for key in tensors)
    torch.save(tensors, tmp_path / "pytorch_lora_weights.bin")
    assert relative(ours(tiny_model_file, tmp_path / "pytorch_lora_weights.bin"), theirs(pipe)) < TOLERANCE


def test_every_key_has_its_place(pipe, tiny_model_file, tmp_path):
    """None is dropped: as many layers as the file has."""
    adapted(pipe, SCALES["alpha above the rank"])
    parts = states(pipe)
    layers: Layers = read_lora(by_diffusers(pipe, tmp_path / "a"), open_model(tiny_model_file).state_dicts)
    assert {name: 2 * len(inner) for name, inner in layers.items()} == {n: len(p) for n, p in parts.items()}
