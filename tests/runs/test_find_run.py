"""What --resume takes for a run."""

from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.runs.command import read_command
from ldm.runs.find_run import find_run


@pytest.fixture
def logs(workdir: Path) -> Path:
    for name in ("rex", "rex-2", "study-a/plain--rex--23"):
        (workdir / "logs" / name / "checkpoints").mkdir(parents=True)
        (workdir / "logs" / name / "config.yaml").write_text("name: rex\n")
    for step in (2, 4):
        (workdir / f"logs/rex/checkpoints/step-{step:08d}.ckpt").write_bytes(b"")
    (workdir / "logs/rex/model.safetensors").write_bytes(b"")
    (workdir / "somewhere").mkdir()
    return workdir / "logs"


@pytest.mark.parametrize(
    "given",
    [
        *("rex", "logs/rex", "logs/rex/", "./logs/rex", "logs/rex/config.yaml", "logs/rex/checkpoints"),
        *("logs/rex/checkpoints/step-00000004.ckpt", "rex/checkpoints", "logs/rex/model.safetensors"),
    ],
)
def test_whatever_lies_in_a_run_names_it(logs: Path, given: str):
    assert find_run(given) == Path("logs/rex")
    assert Path(read_command(["--resume", given], description=None).resume) == Path("logs/rex")
    assert find_run(logs.parent / given.removeprefix("./")) == logs / "rex" if "logs" in given else True


def test_a_run_of_a_study_and_a_run_that_one_stands_in(logs: Path, monkeypatch: pytest.MonkeyPatch):
    assert find_run("study-a/plain--rex--23") == Path("logs/study-a/plain--rex--23")
    monkeypatch.chdir(logs / "rex")
    assert find_run(".") == Path()
    assert find_run(logs / "rex" / "checkpoints") == logs / "rex"


@pytest.mark.parametrize(
    "given, sentence",
    [
        ("rexx", "no such run .rexx.*A run is a folder that main.py has made.*did you mean `rex`"),
        ("tomcat", "under logs/: rex, rex-2, study-a/plain--rex--23"),
        ("somewhere", "There is no such run"),
        ("logs", "There is no such run"),
        (
            "logs/rex/checkpoints/step-00000002.ckpt",
            "newest checkpoint, step-00000004.ckpt.*remove the later",
        ),
        ("logs/rex/checkpoints/step-00000003.ckpt", "no such checkpoint.*the newest is step-00000004.ckpt"),
        ("logs/rex-2/checkpoints/step-4.ckpt", "no such checkpoint.*it has none yet"),
        ("logs/rex/modle.safetensors", "no such file in the run"),
        ("", "There is no such run"),
    ],
)
def test_what_is_no_run_is_said_with_what_a_run_is(logs: Path, given: str, sentence: str):
    with pytest.raises(UserError, match=sentence):
        find_run(given)
    with pytest.raises(UserError, match=sentence):
        read_command(["--resume", given], description=None)


def test_a_run_without_a_config_around_it_is_not_the_current_folder(logs: Path):
    (logs.parent / "config.yaml").write_text("name: mine\n")
    with pytest.raises(UserError, match="There is no such run"):
        find_run("tomcat")
