"""Peak memory: of a phase of this process, and of a computation on tensors without data."""

import ctypes
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CLEAR_REFS = Path("/proc/self/clear_refs")  # Linux: writing 5 resets the peak of resident memory


def reset_peak_memory() -> bool:
    """Resets peak memory and frees caches; False where the system cannot do that."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return True
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


class PeakBytes(TorchDispatchMode):
    """While entered, tracks the bytes of the tensors that are created inside and alive -> `peak`.

    Tensors from outside and workspace of kernels are not counted. Works on tensors without data too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._outside: set[int] = set()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        self._outside |= given - self._alive.keys()
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _storage(tensor) not in self._outside:
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: kept for key, kept in self._alive.items() if not kept[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
