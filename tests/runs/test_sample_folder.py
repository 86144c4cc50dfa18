"""Folders of sampled images: commands that are started together have one each."""

import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.runs.sample_images import folder_of

SECOND = "2026-01-02T03-04-05"


def within_a_second(model: Path, *, out: Path | None = None) -> Path:
    """The folder of a command that begins in that second."""
    time.strftime = lambda *_: SECOND
    return folder_of(Namespace(out=out, model=model), model)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", time.strftime)  # is put back


def test_commands_of_one_second_have_a_folder_each(tmp_path: Path):
    with ThreadPoolExecutor(4) as started:
        folders = list(started.map(within_a_second, [tmp_path / "model.safetensors"] * 6))
    names = [SECOND, *(f"{SECOND}-{k}" for k in range(2, 7))]
    assert sorted(folders) == sorted(tmp_path / "samples" / name for name in names)
    assert all(folder.is_dir() for folder in folders)


def test_a_folder_that_is_named_is_taken_as_it_is(tmp_path: Path):
    for _ in range(2):
        assert within_a_second(tmp_path / "m.ckpt", out=tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path):
    (tmp_path / "samples").write_text("")
    with pytest.raises(UserError, match="folder cannot be created.*--out FOLDER"):
        within_a_second(tmp_path / "m.ckpt")
    with pytest.raises(UserError, match="cannot be written"):
        within_a_second(tmp_path / "m.ckpt", out=tmp_path / "samples" / "x")
