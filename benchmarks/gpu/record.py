"""What a part of the check is told by its environment, how it times, and where its results go."""

import atexit
import collections
import gc
import json
import os
import re
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import synchronize
from ldm.engine.peak import reset_peak_memory

ROOT = Path(__file__).resolve().parents[2]
DEVICE = os.environ.get("CHECK_DEVICE", "cuda")
SIZE = os.environ.get("CHECK_SIZE", "sd1")
OUT = Path(os.environ.get("OUT", ROOT / "logs/gpu-check")).absolute()
CUDA = DEVICE == "cuda"
HALF = torch.bfloat16 if CUDA else torch.float32
WARM, STEPS, SAMPLING_STEPS = (3, 20, 50) if CUDA else (1, 1, 2)
PART = ""  # that runs
CATEGORIES = {  # of kernels, by their names; the first that fits
    "attention": r"flash|fmha|sdpa|cudnn_generated.*attn|softmax",
    "convolution": r"conv|wgrad|dgrad|fprop|implicit|xmma.*nhwc|cutlass.*(fprop|dgrad|wgrad)",
    "matrix product": r"gemm|cublas|nvjet|splitK|cutlass",
    "layout": r"nchwToNhwc|nhwcToNchw|transpose|permute",
    "norm": r"group_?norm|layer_?norm|RowwiseMoments|GammaBeta|ComputeInternal|ComputeFused",
    "optimizer": r"adam|multi_tensor|foreach|lpnorm",
    "copy or cast": r"copy|Memcpy|Memset|CatArray",
}


def new_folder() -> Path:
    """An empty folder that is removed when the part ends."""
    folder = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def say(what: str, **figures: object) -> None:
    """Appends a result at once, so that a part that is cut short loses only the rest of itself."""
    rounded = {key: round(value, 6) if isinstance(value, float) else value for key, value in figures.items()}
    line = json.dumps({"part": PART, "what": what, **rounded}, default=str)
    OUT.mkdir(parents=True, exist_ok=True)
    with (OUT / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line, flush=True)


def chosen(name: str, words: Sequence[str]) -> bool:
    """Whether a case is asked for: all are, if there are no words."""
    return not words or any(word in name for word in words)


@contextmanager
def attempt(what: str) -> Iterator[None]:
    """A failure is a result too, and the next figure is still taken, in memory that is free again."""
    gc.collect()  # not at the end, where the error still holds what has failed
    if CUDA:
        torch.cuda.empty_cache()
    try:
        yield
    except Exception as error:
        say(what, error=f"{type(error).__name__}: {str(error)[:400]}")
        traceback.print_exc()


def milliseconds(work: Callable[[], object], times: int = STEPS, warm: int = WARM) -> tuple[float, float]:
    """(ms of one call until the device is done, ms until the host had asked for it)."""
    for _ in range(warm):
        work()
    synchronize(DEVICE)
    start = time.perf_counter()
    for _ in range(times):
        work()
    asked = time.perf_counter() - start
    synchronize(DEVICE)
    return 1000 * (time.perf_counter() - start) / times, 1000 * asked / times


def memory() -> dict[str, float]:
    """MiB since `forget_peak`: most that tensors took, most that the allocator held."""
    if not CUDA:
        return {}
    peaks = {"peak_mib": torch.cuda.max_memory_allocated(), "reserved_mib": torch.cuda.max_memory_reserved()}
    return {name: peak / 2**20 for name, peak in peaks.items()}


def forget_peak() -> None:
    """Peaks count from here, without what is freed already: the allocator's cache is given back."""
    gc.collect()
    if CUDA:
        reset_peak_memory()


@contextmanager
def profiled(what: str, steps: int) -> Iterator[None]:
    """Says where the time of `steps` steps taken inside goes, and appends the kernels to profile.txt."""
    synchronize(DEVICE)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
    start = time.perf_counter()
    with profile(activities=activities) as found:
        yield
        synchronize(DEVICE)
    wall = 1000 * (time.perf_counter() - start) / steps
    events = found.events() if CUDA else []  # ranges that a library names, such as an optimizer's, have a #
    kernels = [event for event in events if "CUDA" in str(event.device_type) and "#" not in event.name]
    spent: collections.Counter[str] = collections.Counter()
    for kernel in kernels:
        fits = (name for name, words in CATEGORIES.items() if re.search(words, kernel.name, re.IGNORECASE))
        spent[next(fits, "elementwise and other")] += kernel.time_range.elapsed_us() / 1000 / steps
    figures = {"wall_ms": wall, "busy_ms": sum(spent.values()), "kernels": len(kernels) / steps}
    say(f"profile of {what}", **figures, **dict(spent.most_common()))
    key = "self_device_time_total" if CUDA else "self_cpu_time_total"
    table = found.key_averages().table(sort_by=key, row_limit=22, max_name_column_width=70)
    with (OUT / "profile.txt").open("a", encoding="utf-8") as file:
        file.write(f"\n==== {what}\n{table}\n")
