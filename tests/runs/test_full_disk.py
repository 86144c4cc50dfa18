"""A full disk, or a folder that cannot be written: one sentence, whole files, a run that goes on."""

import errno
import os
import tempfile
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm import files
from ldm.errors import UserError
from ldm.runs.job import run_job
from ldm.runs.options import parse

# What a run writes, in its order
WRITTEN = [
    *("logs/one/inputs.json", "logs/one/config.yaml"),
    *("priors/*/0001.png", "priors/*/0001.safetensors", "priors/*/manifest.json"),
    *("logs/one/samples/before/00-00.png", "cache/*.safetensors", "logs/one/samples/step-000002.png"),
    *("logs/one/checkpoints/step-00000004.ckpt", "logs/one/model.safetensors", "logs/one/samples/00-00.png"),
    *("logs/one/samples/contact_sheet.png", "logs/one/metrics.json", "logs/one/report.html"),
]


class Refusing:
    """A disk on which files of one pattern cannot be written."""

    def __init__(self, root: Path):
        self.root = root
        self.pattern = ""

    def refuses(self, path: Path) -> bool:
        """path: of a temporary file, .NAME.RANDOM.tmp, or of its folder with the name."""
        name = path.relative_to(self.root).as_posix()
        folder, _, last = name.rpartition("/")
        last = last.removeprefix(".").rpartition(".tmp")[0].rpartition(".")[0] if ".tmp" in last else last
        return bool(self.pattern) and fnmatch(f"{folder}/{last}", self.pattern)


def full(disk: Refusing, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content cannot be kept, as fsync says it."""
    sync = files._sync

    def refused(path: Path) -> None:
        if disk.refuses(path.absolute()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(path)

    monkeypatch.setattr(files, "_sync", refused)


def read_only(disk: Refusing, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file can be made; root may write anywhere, so that modes are no test."""
    make = tempfile.mkstemp

    def refused(prefix: str, suffix: str, dir: Path) -> tuple[int, str]:  # noqa: A002
        if disk.refuses(Path(dir).absolute() / f"{prefix}x{suffix}"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return make(prefix=prefix, suffix=suffix, dir=dir)

    monkeypatch.setattr(tempfile, "mkstemp", refused)


@pytest.mark.parametrize(
    "how, sentence", [(full, "The disk is full"), (read_only, "cannot be written: Permission denied")]
)
def test_a_run_that_cannot_write_ends_with_a_sentence_and_goes_on(
    words: list[str], workdir: Path, monkeypatch, how: Callable, sentence: str
):
    """Refused at every kind of file, one after the other, it leaves what a run leaves that never was."""
    config = parse([*words, "samples.every_steps=2", "data.params.cache_root=cache"])
    disk = Refusing(workdir)
    how(disk, monkeypatch)
    for disk.pattern in WRITTEN:
        with pytest.raises(UserError, match=rf"{sentence} \(.*\).*--resume continues a run") as error:
            run_job(config, "auto")
        assert fnmatch(Path(error.value.where).as_posix(), f"*{disk.pattern}")
        assert not list(workdir.rglob("*.tmp"))
    disk.pattern = ""
    paths = run_job(config, "auto")
    assert all(path.exists() and path.parent == Path("logs/one") or "samples" in path.parts for path in paths)
    run_job(parse([*words, "name=whole"]))
    whole, again = (load_file(f"logs/{name}/model.safetensors") for name in ("whole", "one"))
    assert all(torch.equal(whole[key], again[key]) for key in whole)


@pytest.mark.parametrize("word", ["priors.folder=file/priors", "data.params.cache_root=file/cache"])
def test_a_folder_that_cannot_be_made_is_named(words: list[str], workdir: Path, word: str):
    (workdir / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written: .*\(file/"):
        run_job(parse([*words, word]))


def test_samples_where_a_file_stands_in_the_way(words: list[str], workdir: Path):
    (workdir / "logs/one").mkdir(parents=True)
    (workdir / "logs/one/samples").write_text("")
    (workdir / "logs/one/.unfinished").touch()
    with pytest.raises(UserError, match=r"cannot be written: .*samples/before"):
        run_job(parse(words), "auto")


def test_a_run_whose_lock_cannot_be_made(words: list[str], workdir: Path, monkeypatch: pytest.MonkeyPatch):
    opened = Path.open

    def refused(path: Path, *mode: str, **how: object) -> object:
        if path.name == ".unfinished":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, *mode, **how)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(UserError, match="cannot be written: Read-only file system"):
        run_job(parse(words))
