"""A run's folder: one process at a time, runs of one name apart, unfinished ones found again."""

import logging
import os
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from ldm.config import save_config
from ldm.errors import UserError
from ldm.runs import job
from ldm.runs.folder import MARKER, claimed, find_unfinished, folder_to_resume, new_folder
from ldm.runs.options import parse
from ldm.shipped import CONFIGS

HOLD = """
import sys, pathlib
from ldm.runs.folder import claimed
with claimed(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process_in(folder: Path):
    """Another process works on the run meanwhile, and is killed afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout.readline() == b"held\n"
        yield
    finally:
        process.kill()
        process.wait()


def test_two_runs_of_one_name_have_a_folder_each(tmp_path: Path):
    folders = [new_folder(tmp_path / "a" / "run") for _ in range(3)]
    assert [folder.name for folder in folders] == ["run", "run-2", "run-3"]
    assert all(folder.is_dir() for folder in folders)


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="folder cannot be created.*Choose another `name`"):
        new_folder(tmp_path / "file" / "run")


def test_one_process_at_a_time_and_a_killed_one_lets_go(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = new_folder(tmp_path / "run")
    with another_process_in(folder):
        with pytest.raises(UserError, match="Another process is working on this run"), claimed(folder):
            raise AssertionError("two processes are in one run")
        with caplog.at_level(logging.INFO):
            assert find_unfinished("run", logs=tmp_path) is None
        assert "another process is working on it" in caplog.text
    assert find_unfinished("run", logs=tmp_path) == folder
    (folder / ".model.safetensors.abc.tmp").write_bytes(b"half")
    with claimed(folder):
        assert not list(folder.glob("*.tmp"))
        assert (folder / MARKER).exists()
    assert not (folder / MARKER).exists() and find_unfinished("run", logs=tmp_path) is None


def test_an_error_leaves_the_run_unfinished(tmp_path: Path):
    folder = new_folder(tmp_path / "run")
    with pytest.raises(ZeroDivisionError), claimed(folder):
        raise ZeroDivisionError
    assert find_unfinished("run", logs=tmp_path) == folder


def test_auto_takes_the_run_last_worked_on_of_just_this_name(tmp_path: Path):
    now = time.time()
    for age, name in enumerate(["run-2", "run", "runner", "run-b", "run-3"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / MARKER).touch()
        os.utime(tmp_path / name / MARKER, (now - age, now - age))
    assert find_unfinished("run", logs=tmp_path).name == "run-2"
    (tmp_path / "run-2" / MARKER).unlink()
    assert find_unfinished("run", logs=tmp_path).name == "run"


def test_resuming_with_another_config_says_what_changed(tmp_path: Path):
    plain = {"name": "run", "seed": 5}
    first = new_folder(tmp_path / "run")
    (first / "config.yaml").write_text("name: run\nseed: 5\n")
    (first / MARKER).touch()
    same = {"allow_config_change": False, "logs": tmp_path}
    for resume in ("auto", str(first)):
        assert folder_to_resume(plain, resume, **same) == first
    for resume in ("auto", str(first)):
        with pytest.raises(UserError, match="seed: 5 -> 6.*--allow_config_change"):
            folder_to_resume(plain | {"seed": 6}, resume, **same)
    assert folder_to_resume(plain | {"seed": 6}, "auto", allow_config_change=True, logs=tmp_path) == first
    assert folder_to_resume(plain, None, **same) is None and new_folder(tmp_path / "run").name == "run-2"
    assert folder_to_resume({"name": "new"}, "auto", **same) is None


def test_a_name_that_is_none_is_said_before_it_is_looked_for(tmp_path: Path):
    with pytest.raises(UserError, match="does not name a folder inside logs"):
        folder_to_resume({"name": "x" * 300 + "/a"}, "auto", allow_config_change=False, logs=tmp_path)


def test_a_run_whose_folder_was_renamed_is_not_begun_anew_beside_it(tmp_path: Path):
    new_folder(tmp_path / "rex")
    (tmp_path / "rex" / MARKER).touch()
    (tmp_path / "rex" / "config.yaml").write_text("name: max\n")
    with pytest.raises(UserError, match="name: max -> rex"):
        folder_to_resume({"name": "rex"}, "auto", allow_config_change=False, logs=tmp_path)


def test_a_run_that_another_process_took_meanwhile_is_left_to_it(workdir: Path, monkeypatch):
    """Reading photos and base takes long: what was found before is looked for again."""
    config = parse(["--base", str(CONFIGS / "dreambooth.yaml"), "name=rex"])
    first = new_folder(Path("logs/rex"))
    (first / MARKER).touch()
    save_config(config.source, first / "config.yaml")
    trained = []
    monkeypatch.setattr(job, "_train", lambda config, data, folder, **more: trained.append(folder))
    with ExitStack() as stack:

        def slow(config, *, run_folder):
            assert run_folder == first
            stack.enter_context(another_process_in(first))

        monkeypatch.setattr(job, "validate", slow)
        monkeypatch.setattr(job, "with_checkpointing_chosen", lambda config, device: config)
        job.run_job(config, "auto")
    assert trained == [Path("logs/rex-2")]


def test_auto_leaves_another_run_whose_own_name_ends_in_a_number(tmp_path: Path):
    """Numbered by this repo, or so named: the config tells."""
    for folder, name in (("rex-2", "rex-2"), ("rex-3", "rex")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / MARKER).touch()
        (tmp_path / folder / "config.yaml").write_text(f"name: {name}\n")
    os.utime(tmp_path / "rex-2" / MARKER, (time.time() + 9, time.time() + 9))  # the newest
    assert find_unfinished("rex", logs=tmp_path).name == "rex-3"
    assert find_unfinished("rex-2", logs=tmp_path).name == "rex-2"
    (tmp_path / "rex-3" / MARKER).unlink()
    assert find_unfinished("rex", logs=tmp_path) is None
