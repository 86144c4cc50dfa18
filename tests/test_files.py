"""Files are whole or absent."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

from ldm.errors import UserError
from ldm.files import (
    HashingWriter,
    atomic_write,
    file_sha256,
    folder_sha256,
    make_folder,
    remove_leftovers,
    writing,
)


def test_the_new_file_replaces_the_old_one(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
        assert temporary.parent == tmp_path  # a rename across file systems would be a copy
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_an_error_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_killed_process_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    program = (
        "import os, signal, sys; from ldm.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as t: t.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(path)]).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert len(os.listdir(tmp_path)) == 2  # a hidden .tmp beside it


@pytest.mark.skipif(os.name == "nt", reason="file modes are POSIX")
def test_the_file_is_as_readable_as_an_ordinary_one(tmp_path):
    (tmp_path / "ordinary").write_text("")
    with atomic_write(tmp_path / "atomic"):
        pass
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_file_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_the_hash_of_a_folder_is_of_names_and_contents(tmp_path):
    folder, hashes = tmp_path / "a", [folder_sha256(tmp_path / "a")]
    (folder / "inner").mkdir(parents=True)
    changes = [
        lambda: (folder / "x").write_text("x"),
        lambda: (folder / "x").write_text("other"),
        lambda: (folder / "x").rename(folder / "y"),
        lambda: (folder / "inner" / "x").write_text("x"),
        lambda: (folder / "inner" / "x").unlink(),
    ]
    for change in changes:
        change()
        hashes.append(folder_sha256(folder))
    assert len(set(hashes)) == 5 and hashes[3] == hashes[5]
    (folder / ".hidden").write_text("x")
    assert folder_sha256(folder.rename(tmp_path / "b")) == hashes[-1]


def test_what_is_written_is_hashed_on_its_way(tmp_path):
    """torch.save writes the same bytes as to a path, from the beginning to the end."""
    state = {"w": torch.arange(1e5), "more": [torch.ones(3, 3), 5], "name": "x" * 1000}
    with (tmp_path / "a.pt").open("wb") as file:
        hashed = HashingWriter(file)
        torch.save(state, hashed)
    assert hashed.sha256 == file_sha256(tmp_path / "a.pt")
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    assert torch.equal(loaded["w"], state["w"]) and loaded["name"] == state["name"]


def test_threads_write_side_by_side(tmp_path):
    def write(k):
        with atomic_write(tmp_path / str(k)) as temporary:
            temporary.write_text(str(k))

    mask = os.umask(0)
    os.umask(mask)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(64)))
    assert sorted(int(path.read_text()) for path in tmp_path.iterdir()) == list(range(64))
    assert os.umask(mask) == mask


def test_what_killed_processes_left_is_removed(tmp_path):
    """Files, folders with what is in them, at any depth; a link is removed, not what it points to."""
    kept = [tmp_path / "model.safetensors", tmp_path / "x.tmp", tmp_path / "elsewhere" / "a.bin"]
    left = [tmp_path / ".a.bin.xyz.tmp", tmp_path / "in" / ".b.tmp", tmp_path / ".c.tmp" / "unet" / ".d.tmp"]
    for path in (*kept, *left):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / ".link.tmp").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    remove_leftovers(tmp_path)
    assert {p.name for p in tmp_path.rglob("*") if not p.is_dir()} == {path.name for path in kept}
    remove_leftovers(tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a disk that is always full")
@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_text("x" * 100_000),
        lambda path: path.write_bytes(bytes(100_000)),
        lambda path: torch.save(torch.zeros(100_000), path.open("wb")),
        lambda path: Image.effect_noise((300, 300), 90).save(path, format="PNG"),
    ],
    ids=["text", "bytes", "torch", "png"],
)
def test_a_full_disk_is_one_sentence_whichever_library_writes(tmp_path, write):
    (tmp_path / "full").symlink_to("/dev/full")
    with (
        pytest.raises(UserError, match=r"The disk is full \(a\.bin\).*--resume continues a run"),
        writing("a.bin"),
    ):
        write(tmp_path / "full")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO])
def test_what_the_system_refuses_leaves_the_old_file(tmp_path, number):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(UserError, match="a.bin"), atomic_write(path) as temporary:
        temporary.write_bytes(b"half")
        raise OSError(number, os.strerror(number))
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]


def test_folders_that_cannot_be_made_or_are_no_folders(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(UserError, match="cannot be written"):
            make_folder(path)
    with pytest.raises(UserError, match="cannot be written"), atomic_write(tmp_path / "absent" / "a.bin"):
        pass
    assert make_folder(make_folder(tmp_path / "a" / "b")).is_dir()


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (ValueError("no space left"), UserError("said", where="x"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, writing(tmp_path / "a"):
            raise error
        assert caught.value is error
