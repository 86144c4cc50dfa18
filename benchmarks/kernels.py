"""Where a training step goes: the share of its time in the kernels that any implementation has to run.

    python -m benchmarks.kernels [--size storybook quarter]

Self CPU time by torch's profiler, of ours and of diffusers' networks at their best, each in its own process.
What is not listed (copies, additions, dispatch, Python) is what an implementation may save.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import Case
from benchmarks.ours import export
from benchmarks.side import open_side
from ldm.engine.device import keep_freed_memory

STEPS = 6
KERNELS = {  # what is listed -> parts of the names of its operators
    "convolution": ("convolution",),
    "matrix product": ("addmm", "aten::mm", "aten::bmm", "baddbmm"),
    "attention": ("_attention",),
    "norm": ("native_group_norm", "native_layer_norm"),
    "activation": ("aten::silu", "aten::gelu"),
    "AdamW": ("_fused_adam",),
}


def shares(name: str, case: Case, folder: Path) -> dict[str, float]:
    """Share of a step's self CPU time in each kind of kernel."""
    profiler = profile(activities=[ProfilerActivity.CPU])

    def counts() -> Iterator[int]:
        yield 3
        profiler.start()
        yield STEPS
        profiler.stop()

    open_side(name, case, folder, device="cpu", compiled=False).serve(counts(), lambda seconds: None)
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    total = sum(times.values())
    return {
        kind: sum(time for key, time in times.items() if any(part in key for part in parts)) / total
        for kind, parts in KERNELS.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", default=["storybook", "quarter"])
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)  # of a process: name, folder
    options = parser.parse_args()
    keep_freed_memory()
    for size in options.size:
        case = Case(size, "train", 8 if size == "storybook" else 2, text=True)
        if options.side:
            found = shares(options.side[0], case, Path(options.side[1]))
            listed = ", ".join(f"{kind} {share:.1%}" for kind, share in found.items())
            print(f"{case.name}, {options.side[0]}: {sum(found.values()):.1%} ({listed})", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            export(case, Path(folder))
            for name in ("ours", "best"):
                command = [sys.executable, "-m", "benchmarks.kernels", "--size", size, "--side", name, folder]
                subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
