"""Atomic file writing: a file is complete or absent, whenever the process is killed."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from ldm.errors import UserError

_UMASK_LOCK = threading.Lock()
FULL = (errno.ENOSPC, errno.EDQUOT)
FULL_TEXTS = ("no space left on device", "disk quota exceeded", "os error 28", "os error 122")
SPACE = "Free some space and run the command again; what was written stays, and --resume continues a run."
PLACE = "Choose a folder that can be written; what was written stays, and --resume continues a run."


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Atomic write: yields a temporary path in the same folder, which replaces `path` on leaving.

    The temporary file is synchronized to disk (fsync) before the rename, and the folder after it, so a crash
    leaves either the old file or the new one. On an exception the temporary file is removed and `path` stays
    as it was; only a killed process leaves a `.*.tmp`. Raises UserError where the disk is full, or the folder
    cannot be written.
    """
    path = Path(path)
    with writing(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~_umask())  # mkstemp makes it private
            _sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(path.parent)


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raises UserError for what the disk or the folder of `path` refuses inside the block.

    Libraries that write files by themselves raise exceptions of their own for a full disk, which name it.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = getattr(error, "errno", None)
        if any(map(_says_full, _chain(error))):
            raise UserError("The disk is full", where=path, remedy=SPACE) from error
        if isinstance(error, OSError) and number is not None:
            what = f"This cannot be written: {error.strerror or error}"
            raise UserError(what, where=path, remedy=PLACE) from error
        raise


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, and those during whose handling it was raised: a writer may fail again as it closes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _says_full(error: BaseException) -> bool:
    return getattr(error, "errno", None) in FULL or any(text in str(error).lower() for text in FULL_TEXTS)


def make_folder(folder: Path) -> Path:
    """Creates a folder, and those around it, unless it is there. Raises UserError where it cannot be."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


class HashingWriter:
    """A binary file open for writing that computes the SHA-256 of what passes, which need not be read again.

    For writers that go from the beginning to the end, as `torch.save` does.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self._hash = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        self._hash.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    @property
    def sha256(self) -> str:
        """Of all bytes so far, 64 hex digits."""
        return self._hash.hexdigest()


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_sha256(files: Iterable[Path], *, within: Path) -> str:
    """SHA-256 of files' names, relative to a folder, and contents, as 64 hex digits.

    A file is read once in a process, as long as its size and time stay the same.
    """
    lines = [f"{_sha256_once(*stamp(path))}  {path.relative_to(within).as_posix()}\n" for path in files]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def folder_sha256(folder: Path) -> str:
    """`files_sha256` of what is in a folder and its subfolders, but for hidden files; also of no folder."""
    paths = [*folder.glob("[!.]*"), *folder.glob("[!.]*/[!.]*")]
    return files_sha256([path for path in paths if path.is_file()], within=folder)


def path_sha256(path: Path) -> str:
    """SHA-256 of a file, or `folder_sha256`, each file read once in a process as long as it is untouched."""
    return folder_sha256(path) if path.is_dir() else _sha256_once(*stamp(path))


def stamp(path: Path) -> tuple[Path, int, int]:
    """A file with its size and time, which change with its content."""
    stat = path.stat()
    return path.absolute(), stat.st_size, stat.st_mtime_ns


@cache
def _sha256_once(path: Path, size: int, mtime_ns: int) -> str:
    return file_sha256(path)


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says. Raises ValueError for what is none, or is nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def require_space(folder: Path, needed: int, *, what: str) -> None:
    """Raises UserError if fewer than `needed` bytes are free where a folder is, or is to be made."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        what = f"The disk has {free / 2**30:.2f} GiB free, {what} would take {needed / 2**30:.2f} GiB"
        raise UserError(what, where=folder.resolve(), remedy="Free some space, or choose another folder.")


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left, files and folders, in subfolders too; none may be writing there."""
    for path in list(folder.rglob(".*.tmp")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_section(path: Path, name: str, text: str) -> None:
    """Replaces the text between the comments <!-- name --> and <!-- /name --> of a Markdown file."""
    before, _, after = _around_section(path, name)
    with atomic_write(path) as temporary:
        temporary.write_text(f"{before}\n{text}\n{after}", encoding="utf-8")


def read_section(path: Path, name: str) -> str:
    """The text between the comments <!-- name --> and <!-- /name --> of a Markdown file."""
    return _around_section(path, name)[1]


def _around_section(path: Path, name: str) -> tuple[str, str, str]:
    """The text up to a section's first comment, inside the section, and from its last comment on."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    inside, found, after = rest.partition(end)
    if not found:
        raise UserError(f"There is no section {begin} to {end}", where=path, remedy="Add both comments.")
    return before + begin, inside, end + after


def _sync(path: Path) -> None:
    """Synchronizes a file or a folder to disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it: by one thread at a time."""
    with _UMASK_LOCK:
        mask = os.umask(0)
        os.umask(mask)
    return mask
