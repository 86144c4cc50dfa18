"""Adapters, extracted LoRAs and SDXL's files from anywhere: each is read, or refused in a sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.checkpoints.load import open_model
from ldm.checkpoints.lora import merge_lora, read_lora
from ldm.checkpoints.lora_ranks import KEY, read_ranks
from ldm.checkpoints.tensors import read_tensors
from ldm.commands import convert
from tests.families.conftest import xl_file, xl_folder  # noqa: F401
from tests.hostile.conftest import examples, refused_or
from tests.hostile.test_model_files import DEEP, mutate, odd_tensors, read_whole, values

LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"  # 32 -> 32
KINDS = {  # ends of names -> shapes, as the LyCORIS library writes them
    "LoHa": {
        "hada_w1_a": [32, 2],
        "hada_w1_b": [2, 32],
        "hada_w2_a": [32, 2],
        "hada_w2_b": [2, 32],
        "alpha": [],
    },
    "LoKr": {"lokr_w1": [4, 4], "lokr_w2": [8, 8], "alpha": []},
    "LoKr of factors": {"lokr_w1_a": [4, 2], "lokr_w1_b": [2, 4], "lokr_w2_a": [8, 2], "lokr_w2_b": [2, 8]},
    "DoRA": {"lora_down.weight": [2, 32], "lora_up.weight": [32, 2], "dora_scale": [32, 1], "alpha": []},
    "OFT": {"oft_blocks": [4, 8, 8], "alpha": []},
    "PEFT's OFT": {"oft_R.weight": [4, 28]},
    "whole differences": {"diff": [32, 32], "diff_b": [32]},
    "(IA)^3": {"weight": [32, 1], "on_input": []},
    "Tucker": {
        "lora_mid.weight": [2, 2, 1, 1],
        "lora_down.weight": [2, 32, 1, 1],
        "lora_up.weight": [32, 2, 1, 1],
    },
}


@pytest.fixture
def merged(tiny_model_file: Path) -> Callable[[Path], float]:
    """Reads an adapter and merges it into the tiny model."""
    state_dicts = open_model(tiny_model_file).state_dicts

    def merge(path: Path) -> float:
        unet = merge_lora(state_dicts, read_lora(path, state_dicts))["unet"]
        return sum(float(unet[name].sum()) for name in unet)

    return merge


@examples(20)
@given(data=st.data(), kind=st.sampled_from(list(KINDS)), layer=st.sampled_from([LAYER, "lora_te_x", "x"]))
def test_any_adapter_of_another_kind(data, kind: str, layer: str, merged: Callable, tmp_path: Path):
    tensors = {f"{layer}.{end}": torch.ones(shape) for end, shape in KINDS[kind].items()}
    if data.draw(st.booleans()):  # two kinds in one file
        other = KINDS[data.draw(st.sampled_from(list(KINDS)))]
        tensors |= {f"{LAYER}.{end}": torch.ones(shape) for end, shape in other.items()}
    mutate(data.draw, tensors)
    assume(tensors)
    header = data.draw(st.sampled_from(["", "[]", "{", DEEP, '{"algo": 5}', '{"algo": "loha"}']))
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"ss_network_args": header, "ss_network_module": "lycoris.kohya"})
    refused_or(lambda: merged(path))


@examples(20)
@given(told=values | st.fixed_dictionaries({name: values for name in ("rank", "min_rank", "timesteps")}))
def test_any_ranks_by_timestep(told: object, tmp_path: Path):
    text = DEEP if told is None else json.dumps(told)
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors", metadata={KEY: text})
    refused_or(lambda: read_ranks(tmp_path / "x.safetensors"))


@examples(5)
@given(
    data=st.data(),
    rank=st.sampled_from(["1", "3", "99999", "0", "-1"]),
    dtype=st.sampled_from(["fp16", "fp32", "bf16"]),
)
def test_any_pair_that_a_lora_is_extracted_from(
    data, rank: str, dtype: str, tiny_model_file, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("pair")
    tensors = load_file(tiny_model_file)
    name = data.draw(st.sampled_from(sorted(tensors)))
    how = data.draw(st.sampled_from(["mutate", "shift", "infinity", "huge"]))
    if how == "mutate":
        mutate(data.draw, tensors)
    else:
        tensors[name] = tensors[name] + {"shift": 1.0, "infinity": torch.inf, "huge": 1e30}[how]
    save_file(tensors, folder / "tuned.safetensors", metadata=read_tensors(tiny_model_file)[1])
    words = [str(folder / "tuned.safetensors"), str(folder / "lora.safetensors")]
    words += ["--extract_lora", str(tiny_model_file), "--rank", rank, "--dtype", dtype]

    def extract() -> Path:
        return convert.main(convert.parse(words))

    written = refused_or(extract)
    assert {path.name for path in folder.iterdir()} <= {"tuned.safetensors", "lora.safetensors"}
    if written is not None:
        assert all(x.isfinite().all() for x in load_file(written).values())


@examples(6)
@given(data=st.data(), metadata=st.booleans())
def test_any_tensors_of_sdxl(data, metadata: bool, xl_file: Path, tmp_path: Path):  # noqa: F811
    tensors: dict[str, Tensor] = load_file(xl_file)
    mutate(data.draw, tensors)
    about = {"modelspec.architecture": data.draw(st.sampled_from(["stable-diffusion-xl-v1-base", "x", DEEP]))}
    about = read_tensors(xl_file)[1] | about if metadata else None
    save_file(tensors, tmp_path / "x.safetensors", metadata=about)
    refused_or(lambda: read_whole(tmp_path / "x.safetensors"))


def test_a_pair_and_a_file_that_are_not_odd_are_taken(tiny_model_file, xl_file: Path, tmp_path):  # noqa: F811
    """So that what is refused is refused for what is odd of it."""
    words = [str(tiny_model_file), str(tmp_path / "lora.safetensors"), "--extract_lora", str(tiny_model_file)]
    tensors = load_file(tiny_model_file)
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    tensors[name] = tensors[name] + 1.0
    save_file(tensors, tmp_path / "tuned.safetensors", metadata=read_tensors(tiny_model_file)[1])
    words[0] = str(tmp_path / "tuned.safetensors")
    assert refused_or(lambda: convert.main(convert.parse(words))) == tmp_path / "lora.safetensors"
    assert refused_or(lambda: read_whole(xl_file)) is not None


@examples(6)
@given(data=st.data(), end=st.sampled_from(["lora_down.weight", "lora_up.weight", "alpha", "hada_w1_a"]))
def test_any_lora_of_sdxl(data, end: str, xl_file: Path, tmp_path: Path):  # noqa: F811
    state_dicts = open_model(xl_file).state_dicts
    starts = ["lora_te1_", "lora_te2_", "lora_unet_", "text_encoder_2.", "lycoris_"]
    layer = "text_model_encoder_layers_0_self_attn_q_proj"
    name = data.draw(st.sampled_from(starts)) + data.draw(
        st.sampled_from([layer, layer.replace("_", "."), "x"])
    )
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 24), f"{name}.lora_up.weight": torch.ones(24, 2)}
    tensors[f"{name}.{end}"] = data.draw(odd_tensors)
    save_file(tensors, tmp_path / "x.safetensors")
    refused_or(lambda: merge_lora(state_dicts, read_lora(tmp_path / "x.safetensors", state_dicts)))


XL_CONFIGS = ["model_index.json", "unet/config.json", "text_encoder_2/config.json"]
XL_CONFIGS += [
    f"tokenizer_2/{name}" for name in ("tokenizer_config.json", "special_tokens_map.json", "vocab.json")
]


@examples(6)
@given(data=st.data(), which=st.sampled_from(XL_CONFIGS))
def test_any_value_in_an_sdxl_folder(data, which: str, xl_folder: Path, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("xl") / "model"
    shutil.copytree(xl_folder, folder)
    file = folder / which
    content = json.loads(file.read_text()) if file.exists() else {}
    if content and data.draw(st.booleans()):
        content[data.draw(st.sampled_from(sorted(content)))] = data.draw(values)
    else:
        content = data.draw(values)
    text = data.draw(st.sampled_from([json.dumps(content), json.dumps(content), DEEP, "\ufeff{"]))
    file.write_text(text, encoding="utf-8")
    refused_or(lambda: read_whole(folder))
