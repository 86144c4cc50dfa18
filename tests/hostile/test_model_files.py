"""Model files from anywhere: each is read, or refused in a sentence; no traceback, no hang, no other file.

`HOSTILE_EXAMPLES=500 python -m pytest tests/hostile` tries more of everything.
"""

import copy
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.checkpoints.embedding import file_stem, read_embedding
from ldm.checkpoints.known import flat
from ldm.checkpoints.load import open_model
from ldm.checkpoints.lora import merge_lora, read_lora
from ldm.checkpoints.modelspec import sampling_defaults, taught_words
from ldm.checkpoints.save_folder import save_folder
from ldm.checkpoints.shards import read_shards
from ldm.checkpoints.tensors import read_tensors
from ldm.diffusion.schedule import make_alphas_cumprod
from ldm.errors import UserError
from ldm.model_file import SCHEDULE, ModelFile, check_model
from ldm.models.learned_tokens import find_words
from tests.hostile.conftest import examples, outcome, refused_or

many = examples(20)
few = examples(6)  # where networks are built of each
numbers = (
    st.integers() | st.floats() | st.sampled_from([0, -1, 2**31, 2**63, 10**11, 10**400, 1e308, 7, 1000])
)
texts = st.text(max_size=6) | st.sampled_from(["²", "9" * 5000, "../../x", "/etc/passwd", "a" * 9000, "v"])
scalars = st.none() | st.booleans() | numbers | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)


def read_whole(path: Path, **how: Any) -> str:
    """All that a command reads of a model file before it computes anything."""
    model = open_model(path, **how)
    check_model(model, model.config)
    make_alphas_cumprod(**{key: model.config[key] for key in SCHEDULE})
    taught_words(model.metadata)
    sampling_defaults(model.metadata, model.family)
    return f"a model of {model.size(model.config['parameterization'])} pixels"


def with_metadata(source: Path, target: Path, metadata: dict[str, str]) -> Path:
    save_file(load_file(source), target, metadata=metadata)
    return target


DEEP = "[" * 100_000 + "]" * 100_000
BAD_METADATA = {  # what it is -> key of the metadata, its text
    "no JSON": ("ldm.config", "{"),
    "a list": ("ldm.config", "[1, 2]"),
    "a number": ("ldm.config", "3"),
    "100,000 brackets": ("ldm.config", DEEP),
    "100,000 objects": ("ldm.config", '{"a":' * 100_000 + "1" + "}" * 100_000),
    "a node that is a list": ("ldm.config", '{"unet": [1]}'),
    "params that are a list": ("ldm.config", '{"unet": {"params": []}}'),
    "no heads": ("ldm.config", '{"unet": {"params": {"num_heads": 0}}}'),
    "heads as text": ("ldm.config", '{"unet": {"params": {"num_heads": "four"}}}'),
    "a third of a head": ("ldm.config", '{"unet": {"params": {"num_heads": 3}}}'),
    "groups that do not divide the channels": ("ldm.config", '{"vae": {"params": {"num_groups": 7}}}'),
    "heads that do not divide the width": (
        "ldm.config",
        '{"text_encoder": {"params": {"num_attention_heads": 5}}}',
    ),
    "1e11 timesteps": ("ldm.config", '{"timesteps": 1e11}'),
    "10**11 timesteps": ("ldm.config", '{"timesteps": 100000000000}'),
    "no timesteps": ("ldm.config", '{"timesteps": 0}'),
    "a beta that is no number": ("ldm.config", '{"linear_end": NaN}'),
    "a scale of infinity": ("ldm.config", '{"vae": {"params": {"scale_factor": Infinity}}}'),
    "an unknown prediction": ("ldm.config", '{"parameterization": "w"}'),
    "an unknown activation": ("ldm.config", '{"text_encoder": {"params": {"hidden_act": "eval"}}}'),
    "a size of ²": ("ldm.size", "²"),
    "a size of 5,000 digits": ("ldm.size", "9" * 5000),
    "a negative size": ("ldm.size", "-64"),
    "a size of 0": ("ldm.size", "0"),
}


@pytest.mark.parametrize("what", BAD_METADATA)
def test_bad_metadata_is_refused(what, tiny_model_file, tiny_config, tmp_path):
    key, text = BAD_METADATA[what]
    if key == "ldm.config" and text.startswith("{") and text.endswith("}") and len(text) < 200:
        config = flat(copy.deepcopy(tiny_config))  # as files have it
        for name, value in json.loads(text).items():
            if isinstance(value, dict) and isinstance(value.get("params"), dict):
                config[name]["params"] |= value["params"]
            else:
                config[name] = value
        text = json.dumps(config)
    metadata = {"ldm.config": json.dumps(tiny_config)} | {key: text}
    file = with_metadata(tiny_model_file, tmp_path / "x.safetensors", metadata)
    got = outcome("metadata of a model file", what, lambda: read_whole(file), hide=tmp_path)
    assert got.startswith("refused: ")
    with pytest.raises(UserError):
        ModelFile(file)


@few
@given(data=st.data())
def test_any_value_in_the_config_of_a_file(data, tiny_model_file, tiny_config, tmp_path):
    config = copy.deepcopy(tiny_config)
    node = (
        config
        if data.draw(st.booleans())
        else config[data.draw(st.sampled_from(["unet", "vae", "text_encoder"]))]
    )
    node = node["params"] if "params" in node and data.draw(st.booleans()) else node
    node[data.draw(st.sampled_from(sorted(node)))] = data.draw(values)
    training = {"data": data.draw(values), "samples": data.draw(values)}
    metadata = {
        "ldm.config": json.dumps(config),
        "ldm.training": data.draw(st.sampled_from([json.dumps(training), "[", DEEP, "3"])),
        "modelspec.resolution": data.draw(texts),
        "modelspec.prediction_type": data.draw(texts),
    }
    file = with_metadata(tiny_model_file, tmp_path / "x.safetensors", metadata)
    refused_or(lambda: read_whole(file))


DTYPES = [
    torch.float32,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int8,
    torch.bool,
    torch.int64,
    torch.complex64,
]
shapes = st.lists(st.integers(0, 5), max_size=5)


def tensor(shape: list[int], dtype: torch.dtype) -> Tensor:
    return torch.ones(shape).to(dtype)


odd_tensors = st.builds(tensor, shapes, st.sampled_from(DTYPES))


def mutate(draw: Callable, tensors: dict[str, Tensor]) -> None:
    """Some tensors are dropped, moved to odd names, of another shape or kind."""
    names = sorted(tensors)
    for name in draw(st.lists(st.sampled_from(names), max_size=3, unique=True)):
        how = draw(st.sampled_from(["drop", "rename", "replace", "beside"]))
        if how == "drop":
            del tensors[name]
        elif how == "replace":
            tensors[name] = draw(odd_tensors)
        else:
            words = name.split(".")
            words[draw(st.integers(0, len(words) - 1))] = draw(
                st.sampled_from(["", "99999999999", "-1", "module", "x", "²", "input_blocks", "9" * 5000])
            )
            tensors[".".join(words)] = tensors.pop(name) if how == "rename" else draw(odd_tensors)


@few
@given(data=st.data(), config=st.booleans())
def test_any_tensors(data, config, tiny_model_file, tiny_config, tmp_path):
    tensors = load_file(tiny_model_file)
    mutate(data.draw, tensors)
    file = tmp_path / "x.safetensors"
    save_file(tensors, file, metadata={"ldm.config": json.dumps(tiny_config)} if config else {})
    refused_or(lambda: read_whole(file))
    refused_or(lambda: read_whole(file, ema=True))
    refused_or(lambda: read_whole(tiny_model_file, vae=file))


class Call:
    """A call that the weights-only unpickler allows, with arguments of our choice."""

    def __init__(self, function: Callable, *arguments: Any):
        self.made = function, arguments

    def __reduce__(self) -> tuple:
        return self.made


REBUILD = torch._utils._rebuild_tensor_v2
BAD_TENSORS: dict[str, Callable[[], Any]] = {
    "a sparse tensor": lambda: torch.eye(3).to_sparse(),
    "a compressed sparse tensor": lambda: torch.eye(3).to_sparse_csr(),
    "a quantized tensor": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "a tensor without values": lambda: torch.ones(3, device="meta"),
    "a complex tensor": lambda: torch.ones(3, dtype=torch.complex64),
    "a nested tensor": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "one number that claims to be 10**12": lambda: torch.ones(1).expand(10**6, 10**6),
    "a rebuilt tensor without arguments": lambda: Call(REBUILD),
    "a rebuilt tensor of text": lambda: Call(REBUILD, "a", "b", "c", "d", "e", "f"),
    "a rebuilt tensor without storage": lambda: Call(REBUILD, None, 0, (3,), (1,), False, {}),
    "a storage offset out of range": lambda: Call(
        REBUILD, torch.ones(3).untyped_storage(), 99, (3,), (1,), False, {}
    ),
    "a parameter of a number": lambda: Call(torch._utils._rebuild_parameter, 3, True, {}),
    "a sparse tensor of nothing": lambda: Call(torch._utils._rebuild_sparse_tensor, torch.sparse_coo, ()),
}


@pytest.mark.parametrize("what", BAD_TENSORS)
@pytest.mark.parametrize("where", ["in the weights", "beside the weights"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bad_tensors_are_refused(what, where, tiny_model_file, tmp_path):
    tensors, path = load_file(tiny_model_file), tmp_path / "x.ckpt"
    name = "model.diffusion_model.out.2.bias"
    content = {"state_dict": tensors | ({name: BAD_TENSORS[what]()} if where == "in the weights" else {})}
    try:
        torch.save(content | ({"other": BAD_TENSORS[what]()} if where == "beside the weights" else {}), path)
    except (RuntimeError, NotImplementedError, pickle.PicklingError) as error:
        pytest.skip(f"torch does not save it: {error}")
    got = outcome("tensors of a .ckpt", f"{what}, {where}", lambda: read_whole(path), hide=tmp_path)
    assert got.startswith("refused: ") or where == "beside the weights"


trees = st.recursive(
    scalars | odd_tensors | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["state_dict", "model", "string_to_param", "*", "metadata"]) | texts,
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


@many
@given(content=trees)
def test_any_pickle(content, tiny_model_file, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    refused_or(lambda: read_whole(tmp_path / "x.pt"))
    refused_or(lambda: read_embedding(tmp_path / "x.pt"))
    refused_or(lambda: read_lora(tmp_path / "x.pt", open_model(tiny_model_file).state_dicts))
    refused_or(lambda: read_whole(tiny_model_file, vae=tmp_path / "x.pt"))


BAD_NAMES = [
    "../x.safetensors",
    "/etc/passwd",
    "sub/x.safetensors",
    "..",
    ".",
    "",
    "a\\b",
    "C:x",
    "x\0",
    3,
    None,
    [],
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
@pytest.mark.parametrize("kind", ["shards", "diffusers folder"])
def test_an_index_names_files_beside_it(kind, name, tiny_model_file, tiny_tokenizer, tmp_path):
    """Not elsewhere, though the file is there."""
    model = open_model(tiny_model_file)
    folder = save_folder(
        tmp_path / "model", model.state_dicts, config=model.config, tokenizer=tiny_tokenizer, size=16
    )
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    for place in (folder, folder / "unet" / "sub"):
        place.mkdir(exist_ok=True)
        save_file(tensors, place / "x.safetensors")
    weights.unlink()
    index = {"weight_map": dict.fromkeys(tensors, name)}
    path = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(index))
    read = {"shards": lambda: read_shards(path), "diffusers folder": lambda: read_whole(folder)}[kind]
    with pytest.raises(UserError, match="index of a model's files cannot be read"):
        read()


@few
@given(
    content=values | st.fixed_dictionaries({"weight_map": values | st.dictionaries(texts, texts, max_size=3)})
)
def test_any_index(content, tmp_path):
    path = tmp_path / "x.safetensors.index.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    refused_or(lambda: read_whole(path))


CONFIGS = [
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/special_tokens_map.json",
]


@few
@given(data=st.data(), which=st.sampled_from(CONFIGS))
def test_any_value_in_a_folder_s_configs(data, which, tiny_model_file, tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder") / "model"
    model = open_model(tiny_model_file)
    save_folder(folder, model.state_dicts, config=model.config, tokenizer=tiny_tokenizer, size=16)
    content = json.loads((folder / which).read_text())
    if data.draw(st.booleans()):
        content[data.draw(st.sampled_from(sorted(content)))] = data.draw(values)
    else:
        content = data.draw(values)
    (folder / which).write_text(json.dumps(content), encoding="utf-8")
    refused_or(lambda: read_whole(folder))
    refused_or(lambda: read_whole(tiny_model_file, vae=folder))


@few
@given(data=st.data())
def test_any_lora(data, tiny_model_file, tmp_path):
    state_dicts = open_model(tiny_model_file).state_dicts
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    down, up = torch.ones(2, 32), torch.ones(32, 2)
    style = data.draw(st.sampled_from(["unet.", "base_model.model.", ""]))
    tensors = {f"{style}{layer}.lora_A.weight": down, f"{style}{layer}.lora_B.weight": up}
    if data.draw(st.booleans()):
        kohya = "lora_unet_" + layer.replace(".", "_")
        tensors = {f"{kohya}.lora_down.weight": down, f"{kohya}.lora_up.weight": up}
        tensors |= {f"{kohya}.alpha": data.draw(odd_tensors)}
    if data.draw(st.booleans()):
        kohya = "lora_unet_" + layer.replace(".", "_")
        loha = {"hada_w1_a": up, "hada_w1_b": down, "hada_w2_a": up, "hada_w2_b": down}
        lokr = {"lokr_w1": torch.ones(4, 4), "lokr_w2": torch.ones(8, 8)}
        own = data.draw(st.sampled_from([loha, lokr])) | {"alpha": data.draw(odd_tensors)}
        tensors = {f"{kohya}.{name}": tensor for name, tensor in own.items()}
    mutate(data.draw, tensors)
    assume(tensors)
    patterns = st.dictionaries(
        st.sampled_from(["to_q", "(a+)+$", "(", ".*.*.*.*.*x", "a" * 300, "[", "\\d+"]) | texts,
        values,
        max_size=2,
    )
    header = {"unet.lora_alpha": data.draw(numbers), "unet.use_rslora": data.draw(values)}
    header |= {"unet.alpha_pattern": data.draw(values | patterns), "lora_alpha": data.draw(values)}
    text = data.draw(st.sampled_from([json.dumps(header), "[]", "{", DEEP]))
    (tmp_path / "adapter_config.json").write_text(
        data.draw(st.sampled_from([text, json.dumps({"lora_alpha": 4})]))
    )
    separate = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(separate, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": text})

    def merged() -> float:
        layers = read_lora(tmp_path / "x.safetensors", state_dicts)
        unet = merge_lora(state_dicts, layers)["unet"]
        return sum(float(unet[name].sum()) for name in unet)

    refused_or(merged)


@many
@given(name=texts, key=texts, value=odd_tensors)
def test_any_word_of_an_embedding(name, key, value, tmp_path):
    stem = file_stem(name)
    assert Path(stem).name == stem and stem not in ("", ".", "..")
    path = tmp_path / "x.safetensors"
    save_file({key: value}, path, metadata={"ldm.word": name})
    refused_or(lambda: read_embedding(path))


@many
@given(prompt=texts, words=st.lists(texts.filter(bool), max_size=4))
def test_any_words_are_found_or_not(prompt, words):
    for found in find_words(prompt, words):
        assert found.word in words and 0 <= found.start < found.end <= len(prompt)


@many
@given(path=texts)
def test_any_path(path, workdir):
    assume(not os.path.exists(path))
    with pytest.raises(UserError):
        open_model(path)
    with pytest.raises(UserError):
        read_tensors(path)
