"""Locks on files, which end with the process that holds them, however it ends.

The locks are POSIX's, which hold between machines on one network file system too. They are a process's, and
closing a file ends its process's lock on it: who holds one does not open the file a second time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ldm.files import make_folder, writing

try:
    import fcntl
except ImportError:  # Windows: two processes in one run are not told apart there
    fcntl = None

CAN_LOCK = fcntl is not None


def try_lock(file: IO[str]) -> bool:
    """Locks a file, if it is not locked; the lock is released when the process ends."""
    if fcntl is None:
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _opened(path: Path) -> IO[str]:
    """The file of a lock, made where there is none."""
    make_folder(path.parent)
    with writing(path):
        return path.open("a")


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Locks a file until the block is left -> whether no other process holds it."""
    with _opened(path) as file:
        yield try_lock(file)


def share(
    names: Sequence[str], locks: Path, *, is_done: Callable[[str], bool], finish: Callable[[int, str], None]
) -> None:
    """Finishes all that is not done and that no other process works on, until there is nothing left.

    names: of what there is to do, in this order; each has its lock in the folder `locks`. finish: gets the
    number of one, from 1, and its name.
    """
    ran = True
    while ran:
        ran = False
        for number, name in enumerate(names, start=1):
            if is_done(name):
                continue
            with claim(locks / name) as mine:
                if mine and not is_done(name):
                    finish(number, name)
                    ran = True


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Waits for a file's lock, and holds it until the block is left."""
    with _opened(path) as file:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield
