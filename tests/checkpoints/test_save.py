"""Writing model files: what is written reads back, and a failure leaves the old file."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from ldm.checkpoints.layout import SCHEDULE_BUFFERS, split
from ldm.checkpoints.load import file_hash, read_checkpoint
from ldm.checkpoints.save import save_model
from ldm.errors import UserError

ALPHAS = torch.linspace(0.999, 0.005, 1000)
POSITIONS = "transformer.text_model.embeddings.position_embedding.weight"


@pytest.fixture
def parts() -> dict[str, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return {
        "unet": {"out.2.weight": torch.randn(4, 3), "out.2.count": torch.tensor([70_001])},
        "vae": {"quant_conv.bias": torch.randn(5).expand(2, 5)},
        "text_encoder": {POSITIONS: torch.randn(8, 2).T.T},
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_what_is_written_reads_back(tmp_path, parts, suffix, dtype):
    metadata = {"ldm.config": '{"a": "é\\n"}', "b": "2"}
    path = tmp_path / "new" / f"model{suffix}"
    assert save_model(path, parts, alphas_cumprod=ALPHAS, dtype=dtype, metadata=metadata) == path
    tensors, read = read_checkpoint(path)
    assert read.items() >= metadata.items()
    for part, expected in parts.items():
        for name, tensor in expected.items():
            stored = split(tensors)[part][name]
            wanted = tensor.to(dtype) if tensor.is_floating_point() else tensor
            assert stored.dtype == wanted.dtype and torch.equal(stored, wanted), name
    assert all(tensors[name].dtype == torch.float32 for name in SCHEDULE_BUFFERS)
    assert torch.equal(tensors["alphas_cumprod"], ALPHAS)
    ids = tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"]
    assert ids.dtype == torch.int64 and ids.tolist() == [list(range(8))]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_equal_content_gives_equal_bytes(tmp_path, parts, suffix):
    metadata = {f"key{k}": "x" * k for k in range(6)}
    paths = [tmp_path / f"{k}{suffix}" for k in range(4)]
    hashes = {file_hash(save_model(p, parts, alphas_cumprod=ALPHAS, metadata=metadata)) for p in paths}
    assert len(hashes) == 1


def test_an_autoencoder_alone_has_no_schedule(tmp_path, parts):
    path = tmp_path / "vae.safetensors"
    save_model(path, {"vae": parts["vae"]}, alphas_cumprod=None)
    with safe_open(path, framework="pt") as file:
        assert list(file.keys()) == ["first_stage_model.quant_conv.bias"]
        assert file.metadata() == {"format": "pt"}


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, parts, monkeypatch):
    path = save_model(tmp_path / "model.safetensors", parts, alphas_cumprod=ALPHAS)
    before = path.read_bytes()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(UserError, match=r"0\.00 GiB free.*model\.safetensors"):
        save_model(path, parts, alphas_cumprod=ALPHAS)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, parts, monkeypatch):
    path = save_model(tmp_path / "model.ckpt", parts, alphas_cumprod=ALPHAS)
    before = path.read_bytes()

    def torn(_, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(UserError, match=r"The disk is full \(.*model\.ckpt\)"):
        save_model(path, parts, alphas_cumprod=ALPHAS)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_fp16_refuses_to_make_infinities(tmp_path, parts):
    parts["unet"]["out.2.weight"][0, 0] = 1e6
    with pytest.raises(UserError, match=r"`out\.2\.weight` holds values up to 1e\+06.*bf16"):
        save_model(tmp_path / "m.ckpt", parts, alphas_cumprod=ALPHAS, dtype=torch.float16)
    assert not list(tmp_path.iterdir())
    save_model(tmp_path / "m.ckpt", parts, alphas_cumprod=ALPHAS, dtype=torch.bfloat16)


def test_other_suffixes_are_refused(tmp_path, parts):
    with pytest.raises(UserError, match=r"`\.bin` is not a model format.*\.safetensors or \.ckpt"):
        save_model(tmp_path / "model.bin", parts, alphas_cumprod=ALPHAS)
