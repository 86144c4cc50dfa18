"""Where a training step goes: the share of its time in kernels that diffusers' step runs too.

    python -m benchmarks.kernels [--size storybook quarter]

Of ours and of diffusers' networks at their best, each in its own process: milliseconds of a step in each kind
of kernel (self CPU time of torch's profiler) and of a step as a whole (without the profiler, which lengthens
all that is no kernel: dispatch, autograd, Python). "Shared" adds up, kind by kind, the lesser of both.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import Case
from benchmarks.ours import export
from benchmarks.side import FIRST_STEPS, open_side
from ldm.engine.device import keep_freed_memory

ROUNDS, STEPS = 3, 6  # of each: a window without the profiler, a window with it
STEP = "step"
NECESSARY = {  # of any implementation: what is listed -> the operators
    "convolution": ("aten::mkldnn_convolution", "aten::convolution_backward"),
    "matrix product": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "attention": (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "norm": (
        "aten::native_group_norm",
        "aten::native_group_norm_backward",
        "aten::native_layer_norm",
        "aten::native_layer_norm_backward",
    ),
    "activation": ("aten::silu", "aten::silu_backward", "aten::gelu", "aten::gelu_backward"),
    "AdamW": ("aten::_fused_adamw_",),
}
KERNELS = NECESSARY | {
    "gradient norm": ("aten::linalg_vector_norm",),
    "sums and products of tensors": ("aten::add", "aten::add_", "aten::mul", "aten::mul_", "aten::sum"),
    "copies": ("aten::copy_", "aten::cat", "aten::fill_"),
}


def milliseconds(name: str, case: Case, folder: Path) -> dict[str, float]:
    """Of a step: in each kind of kernel and as a whole; medians over the rounds."""
    profiled: list[dict[str, float]] = []
    windows: list[float] = []

    def counts() -> Iterator[int]:
        yield FIRST_STEPS
        for _ in range(ROUNDS):
            yield STEPS
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                yield STEPS
            profiled.append({event.key: event.self_cpu_time_total for event in profiler.key_averages()})

    open_side(name, case, folder, device="cpu", compiled=False).serve(counts(), windows.append)
    found = {
        kind: statistics.median(sum(times.get(key, 0) for key in keys) for times in profiled) / STEPS / 1e3
        for kind, keys in KERNELS.items()
    }
    return found | {STEP: statistics.median(windows[1::2]) / STEPS * 1e3}


def report(case: Case, ours: Mapping[str, float], best: Mapping[str, float]) -> str:
    """A Markdown table of both sides, and what its sums are of a step."""
    lines = [f"{case.name}, ms of a step:", "", "| kernels | ours | diffusers' best |", "|---|---|---|"]
    lines += [f"| {kind} | {ours[kind]:.1f} | {best[kind]:.1f} |" for kind in (*KERNELS, STEP)]
    necessary = [sum(side[kind] for kind in NECESSARY) / side[STEP] for side in (ours, best)]
    shared = sum(min(ours[kind], best[kind]) for kind in KERNELS) / ours[STEP]
    lines += [
        "",
        f"Any implementation's: {necessary[0]:.0%} of ours, {necessary[1]:.0%} of diffusers' best.",
        f"Shared: {shared:.0%} of ours.",
    ]
    return "\n".join(lines)


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
            print(json.dumps(milliseconds(options.side[0], case, Path(options.side[1]))), flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            export(case, Path(folder))
            sides = [_process(name, size, folder) for name in ("ours", "best")]
        print(report(case, *sides), flush=True)


def _process(name: str, size: str, folder: str) -> dict[str, float]:
    """`milliseconds` in a process of its own, whose last line they are."""
    command = [sys.executable, "-m", "benchmarks.kernels", "--size", size, "--side", name, folder]
    return json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )


if __name__ == "__main__":
    main()
