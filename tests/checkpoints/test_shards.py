"""Models in shards: no file is larger than allowed, what was split reads as it was, damage is told."""

import json
from pathlib import Path

import pytest
import torch

from ldm.checkpoints.load import file_hash, read_checkpoint
from ldm.checkpoints.shards import INDEX, read_shards, write_shards
from ldm.commands import convert
from ldm.errors import UserError

BASE = Path(__file__).resolve().parents[2] / "ldm/storybook/assets/base.safetensors"
MIB = 2**20


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {f"model.diffusion_model.{k}": torch.randn(k + 1, 64 * 1024) for k in range(4)}


def test_shards_are_small_enough_and_read_back(tmp_path: Path, tensors: dict):
    index = tmp_path / f"x{INDEX}"
    files = write_shards(index, tensors, max_bytes=5 * MIB // 4, metadata={"who": "me"})
    assert files[-1] == index and len(files) > 2
    assert all(path.stat().st_size <= 5 * MIB // 4 for path in files)
    read, metadata = read_checkpoint(index)
    assert read.keys() == tensors.keys() and metadata.items() >= {"who": "me"}.items()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_the_base_in_files_of_16_mib_is_the_base(tmp_path: Path):
    index = convert.main(convert.parse([str(BASE), str(tmp_path / f"base{INDEX}")]))
    assert max(path.stat().st_size for path in tmp_path.iterdir()) <= 16 * MIB
    back = convert.main(convert.parse([str(index), str(tmp_path / "back.safetensors")]))
    (found, metadata), (wanted, about) = read_checkpoint(back), read_checkpoint(BASE)
    config, own = (json.loads(said.pop("ldm.config")) for said in (metadata, about))
    assert config.pop("text_encoder")["params"].items() >= own.pop("text_encoder")["params"].items()
    assert found.keys() == wanted.keys() and metadata.items() >= about.items() and config == own
    networks = [name for name in wanted if "model" in name]  # beside them: the schedule, in float64 by now
    assert len(networks) > 300 and all(torch.equal(found[name], wanted[name]) for name in networks)


def test_the_hash_is_of_all_files(tmp_path: Path, tensors: dict):
    index = tmp_path / f"x{INDEX}"
    first, *_ = write_shards(index, tensors, max_bytes=5 * MIB // 4, metadata={})
    before = file_hash(index)
    (tmp_path / "y.safetensors").write_bytes(b"of no concern")
    assert file_hash(index) == before
    write_shards(
        index, tensors | {min(tensors): tensors[min(tensors)] + 1}, max_bytes=5 * MIB // 4, metadata={}
    )
    assert file_hash(index) != before and first.exists()


def test_a_tensor_larger_than_a_file_is_refused(tmp_path: Path, tensors: dict):
    with pytest.raises(UserError, match=r"`model.diffusion_model.3` has 1048576 bytes"):
        write_shards(tmp_path / f"x{INDEX}", tensors, max_bytes=MIB, metadata={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no JSON", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"weight_map": {"a": 3}}', "cannot be read"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "cannot be read"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "1 of the files that the index lists are missing"),
        ('{"weight_map": {}}', "missing"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, text: str, said: str):
    index = tmp_path / f"x{INDEX}"
    index.write_text(text)
    with pytest.raises(UserError, match=said):
        read_shards(index)


def test_a_tensor_that_is_not_where_the_index_has_it_is_named(tmp_path: Path, tensors: dict):
    index = tmp_path / f"x{INDEX}"
    write_shards(index, tensors, max_bytes=64 * MIB, metadata={})
    content = json.loads(index.read_text())
    content["weight_map"]["model.diffusion_model.9"] = content["weight_map"]["model.diffusion_model.0"]
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"model.diffusion_model.9` is not in"):
        read_shards(index)
