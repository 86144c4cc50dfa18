"""Checkpoints: written whole or not at all, the last few and the best kept, signals heeded between steps."""

import os
import shutil
import signal
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ldm.engine.checkpoints import AtomicCheckpointIO, CheckpointCallback, checksum_path
from ldm.engine.resume import step_of, validate_checkpoint
from ldm.engine.signals import Stopped
from ldm.errors import UserError
from ldm.files import file_sha256
from ldm.runs.options import parse
from ldm.training.latent_diffusion import LatentDiffusion
from tests.short_runs import At, Job, differences, state_of

CONTENT = {"state_dict": {"w": torch.arange(6.0)}, "optimizer_states": [], "loops": {}, "global_step": 3}


def test_a_checkpoint_and_its_sum(tmp_path: Path):
    path = tmp_path / "new" / "step-3.ckpt"
    AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    assert {p.name for p in path.parent.iterdir()} == {"step-3.ckpt", "step-3.ckpt.sha256"}
    assert checksum_path(path).read_text() == f"{file_sha256(path)}  step-3.ckpt\n"
    assert differences(AtomicCheckpointIO().load_checkpoint(path), CONTENT) == []
    AtomicCheckpointIO().remove_checkpoint(path)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_cut_checkpoint_is_seen(tmp_path: Path, keep: float):
    path = tmp_path / "step-3.ckpt"
    AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    os.truncate(path, int(path.stat().st_size * keep))
    assert "SHA-256" in validate_checkpoint(path)
    checksum_path(path).unlink()
    assert validate_checkpoint(path) is not None


def test_what_cannot_be_written_leaves_nothing_half_done(tmp_path: Path):
    path = tmp_path / "step-3.ckpt"
    (path / "in the way").mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot be written.*step-3\.ckpt"):
        AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(free=2**20))
    with pytest.raises(UserError, match="GiB free, a checkpoint would take"):
        AtomicCheckpointIO().save_checkpoint(CONTENT, tmp_path / "step-3.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_the_last_and_the_best_stay(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The best of these validation losses is the second."""
    losses = {0: 4.0, 1: 3.0, 2: 1.0, 3: 2.0, 4: 5.0}
    monkeypatch.setattr(
        LatentDiffusion,
        "validation_step",
        lambda self, batch, batch_idx: self.log("val/loss", losses[self.global_step]),
    )
    job(tmp_path, checkpoints_kept=1, trainer={"val_check_interval": 1})
    kept = sorted(step_of(path) for path in (tmp_path / "checkpoints").glob("*.ckpt"))
    assert kept == [2, 4]
    assert state_of(tmp_path, 4)["callbacks"]["CheckpointCallback"]["best"] == {"loss": 1.0, "step": 2}
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4  # each with its sum


def test_keeping_none_would_lose_the_run(words: list[str]):
    for key in ("checkpoint_every", "checkpoints_kept"):
        with pytest.raises(UserError, match=rf"^0 .*at least 1\) \({key}"):
            parse([*words, f"{key}=0"])
        assert getattr(parse([*words, f"{key}=1"]), key) == 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_the_step_saves_and_exits(job: Job, tmp_path: Path, signum: int):
    job = replace(job, accumulate=2)
    arrives = At(2, lambda: os.kill(os.getpid(), signum))  # in the middle of the second step
    handlers = signal.getsignal(signum)
    with pytest.raises(Stopped) as stopped:
        job(tmp_path / "again", callbacks=[arrives], checkpoint_every=100)
    assert stopped.value.code == 128 + signum
    assert signal.getsignal(signum) == handlers
    assert [p.name for p in (tmp_path / "again" / "checkpoints").glob("*.ckpt")] == ["step-00000002.ckpt"]
    if signum == signal.SIGTERM:
        again, whole = job(tmp_path / "again"), job(tmp_path / "whole")
        assert differences(again.state_dict(), whole.state_dict()) == []


def test_a_signal_before_the_first_step_is_heeded(job: Job, tmp_path: Path):
    class Early(At):
        def setup(self, trainer: object, module: object, stage: str) -> None:
            self.act()

    with pytest.raises(Stopped) as stopped:
        job(tmp_path, callbacks=[Early(-1, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    assert stopped.value.code == 143
    assert not (tmp_path / "checkpoints").exists()


def test_checkpoints_of_this_kind_are_no_others(tmp_path: Path):
    saves = CheckpointCallback(tmp_path, every=1, keep=1, stop=None, guard=None)
    saves.best = {"loss": 0.5, "step": 3}
    other = CheckpointCallback(tmp_path, every=1, keep=1, stop=None, guard=None)
    other.load_state_dict(saves.state_dict())
    assert other.best == saves.best
