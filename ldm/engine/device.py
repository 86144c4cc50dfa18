"""The device of a run, its precision and its memory."""

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ldm.schema import MatmulPrecision, TrainerOptions

try:
    import resource
except ImportError:  # Windows
    resource = None

# Where a command computes unless it is told otherwise
DEVICE = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def device_of(trainer: TrainerOptions) -> torch.device:
    """The device that a Trainer with these options will train on, in this process."""
    accelerator, devices = trainer.accelerator, trainer.devices
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
        return torch.device("cuda", devices[rank] if isinstance(devices, list) else rank)
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def set_matmul_precision(precision: MatmulPrecision) -> None:
    """Precision of float32 matrix products on a GPU; "high" is TF32 (10 bits of mantissa), much faster.

    It has no effect on a CPU.
    """
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision(precision)


def keep_freed_memory() -> None:
    """Keeps freed host memory in the process, by malloc's thresholds (glibc only).

    Otherwise every step returns the memory of its activations and gradients to the system and faults it in
    again, page by page, which takes some per cent of a step on a CPU. Peak memory stays the same.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    for size in (2**25, 2**30):  # older versions accept 32 MiB at most
        mallopt(M_MMAP_THRESHOLD, size)


def can_pin() -> bool:
    """Whether a batch is made in pinned memory: with a GPU, but not in a process that reads for another.

    A forked process cannot use CUDA; what it makes is pinned by its DataLoader.
    """
    return torch.cuda.is_available() and torch.utils.data.get_worker_info() is None


def is_awaited(device: torch.device) -> bool:
    """Whether an asynchronous copy to the host can be waited for: MPS has no event here."""
    return device.type != "mps"


def free_memory(device: torch.device) -> int:
    """Bytes that a process may still take: of the GPU, or of the machine and the group that limits it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = []
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if meminfo.exists():
        (line,) = (line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        free.append(1024 * int(line.split()[1]))
    elif not hasattr(os, "sysconf"):  # Windows, which is not asked
        return sys.maxsize
    else:  # macOS: all that the machine has
        free.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit = group / "memory.max"
    if limit.exists() and limit.read_text().strip() != "max":
        free.append(int(limit.read_text()) - int((group / "memory.current").read_text()))
    return min(free)


def peak_memory_mib() -> float:
    """Most memory held since the last `reset_peak_memory`: on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**20
    return peak_resident_mib()


def peak_resident_mib() -> float:
    """Peak resident memory of this process in MiB; 0 on Windows, which is not asked."""
    status = Path("/proc/self/status")  # unlike `ru_maxrss`, not inherited from the parent process
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    if resource is None:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


@contextmanager
def temporarily_on(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Moves a network to `device` inside a `with` block, and back afterwards."""
    before = next(network.parameters()).device
    network.to(device)
    try:
        yield
    finally:
        network.to(before)
