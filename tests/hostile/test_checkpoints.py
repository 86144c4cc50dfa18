"""Checkpoints from anywhere: whole ones are resumed from, others skipped or refused; none runs code."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from ldm.checkpoints.tensors import read_tensors
from ldm.errors import UserError
from ldm.training.checkpoints import AtomicCheckpointIO, checksum_path
from ldm.training.resume import latest_valid_checkpoint, validate_checkpoint
from tests.hostile.conftest import HOSTILE, outcome

WEIGHTS = {"state_dict": {"w": torch.arange(64.0)}}
CONTENT = WEIGHTS | {"optimizer_states": [], "loops": {}, "global_step": 3}


class Payload:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("payload-has-run",)


def saved(content: object, folder: Path) -> bytes:
    torch.save(content, folder / "made.ckpt")
    return (folder / "made.ckpt").read_bytes()


BAD = {  # what it is -> its bytes
    "an empty file": lambda folder: b"",
    "half a checkpoint": lambda folder: saved(CONTENT, folder)[:700],
    "a checkpoint without its end": lambda folder: saved(CONTENT, folder)[:-30],
    "a zip of something else": lambda folder: b"PK\x05\x06" + bytes(18),
    "text": lambda folder: b"no checkpoint",
    "a pickle that makes a folder": lambda folder: pickle.dumps(Payload()),
    "a torch file whose pickle makes a folder": lambda folder: saved({"state_dict": Payload()}, folder),
    "a list of tensors": lambda folder: saved([torch.ones(2)], folder),
    "weights that are no tensors": lambda folder: saved(CONTENT | {"state_dict": {"w": "text"}}, folder),
    "weights without a training's state": lambda folder: saved(WEIGHTS, folder),
    "a safetensors file": lambda folder: save({"w": torch.ones(3)}),
    "a safetensors file cut short": lambda folder: save({"w": torch.ones(300)})[:-100],
    "a safetensors header of 2**60 bytes": lambda folder: (2**60).to_bytes(8, "little") + b"{}",
}
MODELS = {"a safetensors file", "weights without a training's state"}  # good as a base, nothing to resume


@pytest.mark.parametrize("what", BAD)
def test_bad_checkpoints_are_never_resumed_from(workdir: Path, what: str):
    folder = workdir / "checkpoints"
    folder.mkdir()
    (folder / "step-5.ckpt").write_bytes(BAD[what](workdir))
    got = outcome(
        "checkpoint to resume from", what, lambda: validate_checkpoint(folder / "step-5.ckpt") or "taken"
    )
    assert got != "taken"
    AtomicCheckpointIO().save_checkpoint(CONTENT, folder / "step-3.ckpt")
    assert latest_valid_checkpoint(folder).name == "step-3.ckpt"
    assert not Path("payload-has-run").exists()


@pytest.mark.parametrize("what", BAD)
def test_bad_models_are_refused(workdir: Path, what: str):
    (workdir / "model.ckpt").write_bytes(BAD[what](workdir))

    def read() -> str:
        tensors, _ = read_tensors(workdir / "model.ckpt")
        return f"a model of {len([tensors[name].sum() for name in tensors])} tensors"

    got = outcome("base model", what, read, hide=workdir)
    assert got == "a model of 1 tensors" if what in MODELS else got.startswith("refused: ")
    assert not Path("payload-has-run").exists()


@settings(HOSTILE, max_examples=80)
@given(flip=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.none() | st.floats(0, 1))
def test_any_bit_and_any_cut_is_seen(workdir: Path, flip: float, bit: int, cut: float | None):
    path = workdir / "step-3.ckpt"
    AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    content = bytearray(path.read_bytes())
    if cut is None:
        content[int(flip * len(content))] ^= 1 << bit
    else:
        del content[int(cut * (len(content) - 1)) :]
    path.write_bytes(content)
    assert "SHA-256" in validate_checkpoint(path)
    checksum_path(path).unlink()
    validate_checkpoint(path)  # without its sum it may pass, and never raises
    try:
        tensors, _ = read_tensors(path)
        assert all(tensors[name] is not None for name in tensors)
    except UserError as error:
        assert error.where == path


@settings(HOSTILE, max_examples=80)
@given(
    start=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02}", b"\x80\x02]", b"{", bytes(7)]), rest=st.binary()
)
def test_any_bytes(workdir: Path, start: bytes, rest: bytes):
    path = workdir / "step-3.ckpt"
    path.write_bytes(start + rest)
    assert validate_checkpoint(path) is not None
    with pytest.raises(UserError):
        read_tensors(path)
