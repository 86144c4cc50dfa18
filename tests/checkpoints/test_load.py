"""Reading model files: what loads gives equal tensors, what doesn't is refused with reason and way out."""

import hashlib
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ldm.checkpoints.load import file_hash, load_state_dicts, read_checkpoint, read_tensors
from ldm.errors import UserError

NAMES = ("model.diffusion_model.out.2.bias", "first_stage_model.quant_conv.bias")
TENSORS = {name: torch.arange(4.0) + k for k, name in enumerate(NAMES)}


def assert_same(read: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in expected)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_format_is_told_by_content_not_by_suffix(tmp_path, suffix):
    save_file(TENSORS, tmp_path / f"a{suffix}", metadata={"who": "me"})
    torch.save({"state_dict": TENSORS, "metadata": {"who": "me"}, "global_step": 7}, tmp_path / f"b{suffix}")
    for name in "ab":
        tensors, metadata = read_checkpoint(tmp_path / f"{name}{suffix}")
        assert_same(tensors, TENSORS)
        assert metadata == {"who": "me"}


def test_bare_legacy_and_foreign_pickles(tmp_path):
    torch.save(TENSORS, tmp_path / "bare.pt")
    torch.save(TENSORS, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": TENSORS, "metadata": 3, "epoch": 2}, tmp_path / "odd.ckpt")
    for name in ("bare.pt", "legacy.pt", "odd.ckpt"):
        tensors, metadata = read_checkpoint(tmp_path / name)
        assert_same(tensors, TENSORS)
        assert metadata == {}


def test_averages_are_chosen_on_demand(tmp_path):
    tensors = TENSORS | {"model_ema.diffusion_modelout2bias": torch.full((4,), 9.0)}
    save_file(tensors, tmp_path / "full.safetensors")
    assert read_checkpoint(tmp_path / "full.safetensors")[0][NAMES[0]].tolist() == [0, 1, 2, 3]
    assert read_checkpoint(tmp_path / "full.safetensors", ema=True)[0][NAMES[0]].tolist() == [9] * 4


class Runs:
    """A pickle that runs a command when it is loaded carelessly."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    path, trace = tmp_path / "evil.ckpt", tmp_path / "trace"
    torch.save({"state_dict": TENSORS, "callbacks": Runs(f"touch {trace}")}, path)
    with pytest.raises(UserError, match=r"asks to run `(posix|nt)\.system`.*evil\.ckpt.*safetensors"):
        read_checkpoint(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # the file does what the test claims


def test_a_class_that_lightning_pickled_beside_the_weights_does_no_harm(tmp_path, monkeypatch):
    """Released SD files hold a reference to ModelCheckpoint and a numpy score under `callbacks`."""
    import numpy as np
    from pytorch_lightning.callbacks import ModelCheckpoint

    state = {"best_model_score": np.float64(0.5), "where": "x"}
    path = tmp_path / "sd.ckpt"
    torch.save({"state_dict": TENSORS, "callbacks": {ModelCheckpoint: state}}, path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    assert_same(read_checkpoint(path)[0], TENSORS)


@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.98])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_truncated_files_are_refused(tmp_path, kind, keep):
    path = tmp_path / "model.any"
    tensors = TENSORS | {"model.diffusion_model.x": torch.rand(300)}
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors}, path, _use_new_zipfile_serialization=kind == "zip")
    read_checkpoint(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(UserError, match=r"(truncated or damaged|is empty).*model\.any"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
        (b'{"a": 1}', "JSON"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "damaged"),
        (bytes(range(256)) * 4, "damaged"),
        (pickle.dumps([1, 2]), "no tensors|damaged"),
        (pickle.dumps({"state_dict": [1]}), "no tensors|damaged"),
    ],
)
def test_garbage_is_named(tmp_path, content, message):
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_checkpoint(path)


def test_a_zip_of_something_else_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.ckpt", "w") as file:
        file.writestr("photo.png", b"x")
    with pytest.raises(UserError, match="damaged"):
        read_checkpoint(tmp_path / "photos.ckpt")


def test_missing_files_and_folders_name_what_is_there(tmp_path):
    save_file(TENSORS, tmp_path / "sd-v1-4.safetensors")
    with pytest.raises(UserError, match=r"sd-v14\.safetensors.*Did you mean sd-v1-4\.safetensors\?"):
        read_checkpoint(tmp_path / "sd-v14.safetensors")
    with pytest.raises(UserError, match=r"is a folder.*It holds sd-v1-4\.safetensors"):
        read_checkpoint(tmp_path)
    with pytest.raises(UserError, match="no such model file"):
        read_checkpoint(tmp_path / "nowhere" / "x.ckpt")


def test_files_of_another_kind_are_told_apart(tmp_path):
    path = tmp_path / "style.safetensors"
    save_file({"lora_unet_mid.lora_down.weight": torch.ones(2)}, path)
    with pytest.raises(UserError, match=r"looks like a LoRA \(.*style\.safetensors\)"):
        read_checkpoint(path)
    assert list(read_tensors(path)[0]) == ["lora_unet_mid.lora_down.weight"]


def modules() -> dict[str, nn.Module]:
    return {"unet": nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), "vae": nn.Conv2d(3, 2, 1)}


def test_weights_are_copied_into_the_modules_own_dtype():
    source, target = modules(), modules()
    target["unet"].double(), target["vae"].half()
    held = target["unet"][0].weight
    load_state_dicts(target, {name: module.state_dict() for name, module in source.items()})
    assert target["unet"][0].weight is held and held.dtype == torch.float64
    assert torch.equal(held, source["unet"][0].weight.double())
    assert torch.equal(target["vae"].weight, source["vae"].weight.half())
    with torch.no_grad():
        held.add_(1)
    assert not torch.equal(held.float(), source["unet"][0].weight)  # a copy, not the file's memory


def test_misfits_are_grouped_by_part_and_nothing_is_copied():
    source, target = modules(), modules()
    before = {name: tensor.clone() for name, tensor in target["unet"].state_dict().items()}
    parts = {name: dict(module.state_dict()) for name, module in source.items()}
    parts["unet"] = {"extra": torch.ones(1), "0.weight": torch.ones(9, 3), "0.bias": parts["unet"]["0.bias"]}
    del parts["vae"]
    with pytest.raises(UserError) as error:
        load_state_dicts(target, parts, where="model.safetensors")
    assert [line.strip() for line in str(error.value).splitlines()] == [
        "The weights do not fit the model:",
        "unet: 2 missing (1.weight, 1.bias)",
        "unet: 1 unknown (extra)",
        "unet: 1 of another shape (0.weight [9, 3] for [4, 3])",
        "vae: the file holds none of its 2 tensors",
        "(model.safetensors). Use the config that the file was trained with.",
    ]
    assert all(torch.equal(tensor, before[name]) for name, tensor in target["unet"].state_dict().items())


def test_long_lists_show_the_first_names_and_the_count():
    target = {"unet": nn.Sequential(*(nn.Linear(1, 1) for _ in range(5)))}
    with pytest.raises(UserError, match=r"unet: 9 missing \(0\.bias, 1\.weight, 1\.bias, \.\.\.\)"):
        load_state_dicts(target, {"unet": {"0.weight": torch.ones(1, 1)}})


def test_hash_is_sha256_of_the_bytes(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    assert file_hash(tmp_path / "a") == hashlib.sha256(b"abc" * 1000).hexdigest()
