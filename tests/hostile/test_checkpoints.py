"""Checkpoints from anywhere: whole ones are resumed from, others skipped or refused; none runs code."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from ldm.checkpoints.tensors import read_tensors
from ldm.engine.checkpoints import AtomicCheckpointIO, checksum_path
from ldm.engine.resume import latest_valid_checkpoint, validate_checkpoint
from tests.hostile.conftest import examples, outcome, refused_or

WEIGHTS = {"state_dict": {"w": torch.arange(64.0)}}
COUNTS = {"total": {"ready": 3, "completed": 3}, "current": {"ready": 3, "completed": 3}}
FIT_LOOP = {"state_dict": {}, "epoch_progress": COUNTS, "epoch_loop.batch_progress": COUNTS}
STATE = {
    "state": {0: {"exp_avg": torch.ones(2), "step": torch.tensor(3.0)}},
    "param_groups": [{"params": [0]}],
}
CONTENT = WEIGHTS | {
    "optimizer_states": [STATE],
    "lr_schedulers": [{}],
    "callbacks": {"a": {}},
    "loops": {"fit_loop": FIT_LOOP},
    "global_step": 3,
    "epoch": 0,
    "pytorch-lightning_version": "2.6.0",
}


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


ODD = [None, 5, "text", [5], {"a": 5}]
OF_ANOTHER_KIND = [(key, odd) for key in CONTENT for odd in ODD if not isinstance(odd, type(CONTENT[key]))]


@pytest.mark.parametrize(("key", "value"), OF_ANOTHER_KIND, ids=repr)
def test_a_checkpoint_of_another_shape_is_set_aside(workdir: Path, key: str, value: object):
    """Each part that a resume reads, as something else: a line, and the older checkpoint is taken."""
    folder = workdir / "checkpoints"
    AtomicCheckpointIO().save_checkpoint(CONTENT, folder / "step-3.ckpt")
    AtomicCheckpointIO().save_checkpoint(CONTENT | {key: value}, folder / "step-5.ckpt")
    assert latest_valid_checkpoint(folder).name == "step-3.ckpt"
    assert (folder / "step-5.ckpt.broken").exists()


INNER = {  # what is wrong within a part
    "a state of 5": {"optimizer_states": [5]},
    "groups without params": {"optimizer_states": [{"state": {}, "param_groups": [{}]}]},
    "a parameter's state of 5": {"optimizer_states": [STATE | {"state": {0: 5}}]},
    "a sparse moment": {"optimizer_states": [STATE | {"state": {0: {"exp_avg": torch.eye(2).to_sparse()}}}]},
    "a sparse weight": {"state_dict": {"w": torch.eye(2).to_sparse()}},
    "a weight without values": {"state_dict": {"w": torch.ones(2, device="meta")}},
    "loops without progress": {"loops": {"fit_loop": {"state_dict": {}}}},
    "progress of text": {"loops": {"fit_loop": FIT_LOOP | {"epoch_progress": {"total": "a", "current": {}}}}},
    "counts of text": {
        "loops": {"fit_loop": FIT_LOOP | {"epoch_progress": COUNTS | {"total": {"ready": "a"}}}}
    },
}


@pytest.mark.parametrize("what", INNER)
def test_a_part_of_another_shape_is_seen(workdir: Path, what: str):
    folder = workdir / "checkpoints"
    AtomicCheckpointIO().save_checkpoint(CONTENT, folder / "step-3.ckpt")
    torch.save(CONTENT | INNER[what], folder / "step-5.ckpt")
    outcome("checkpoint to resume from", what, lambda: validate_checkpoint(folder / "step-5.ckpt") or "taken")
    assert latest_valid_checkpoint(folder).name == "step-3.ckpt"


class Rebuilt:
    """A tensor that is rebuilt by a call without arguments."""

    def __reduce__(self) -> tuple:
        return torch._utils._rebuild_tensor_v2, ()


@pytest.mark.parametrize("name", ["step-5.ckpt", "last.ckpt"])
def test_a_malformed_call_in_a_checkpoint(workdir: Path, name: str):
    folder = workdir / "checkpoints"
    AtomicCheckpointIO().save_checkpoint(CONTENT, folder / "step-3.ckpt")
    torch.save(CONTENT | {"state_dict": {"w": Rebuilt()}}, folder / name)
    assert latest_valid_checkpoint(folder).name == "step-3.ckpt"


@pytest.mark.parametrize("what", BAD)
def test_bad_models_are_refused(workdir: Path, what: str):
    (workdir / "model.ckpt").write_bytes(BAD[what](workdir))

    def read() -> str:
        tensors, _ = read_tensors(workdir / "model.ckpt")
        return f"a model of {len([tensors[name].sum() for name in tensors])} tensors"

    got = outcome("base model", what, read, hide=workdir)
    assert got == "a model of 1 tensors" if what in MODELS else got.startswith("refused: ")
    assert not Path("payload-has-run").exists()


@examples(80)
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

    def read() -> bool:
        tensors, _ = read_tensors(path)
        return all(tensors[name] is not None for name in tensors)

    assert refused_or(read, where=path) in (True, None)


@examples(80)
@given(
    start=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02}", b"\x80\x02]", b"{", bytes(7)]), rest=st.binary()
)
def test_any_bytes(workdir: Path, start: bytes, rest: bytes):
    path = workdir / "step-3.ckpt"
    path.write_bytes(start + rest)
    assert validate_checkpoint(path) is not None
    assert refused_or(lambda: read_tensors(path)) is None
