"""Where the time goes: the share of it in kernels that diffusers' networks run too.

    python -m benchmarks.kernels [--case "storybook: 25 DDIM steps with CFG, batch 8"]

Of ours and of diffusers' networks at their best, each in its own process: milliseconds of a step of training,
or of a sampling, in each kind of kernel (self CPU time of torch's profiler) and as a whole (without the
profiler, which lengthens all that is no kernel: dispatch, autograd, Python). "Shared" adds up, kind by kind,
the lesser of both.
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

ROUNDS = 3  # of each: a window without the profiler, a window with it
STEPS = {"train": 6, "sample": 1}  # a window: steps, or samplings
WHOLE = "as a whole"
CASES = [
    Case("storybook", "train", 8, text=True),
    Case("quarter", "train", 2, text=True),
    Case("storybook", "sample", 8, steps=25),
]
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
    """Of a step or a sampling: in each kind of kernel and as a whole; medians over the rounds."""
    steps = STEPS[case.kind]
    profiled: list[dict[str, float]] = []
    windows: list[float] = []

    def counts() -> Iterator[int]:
        yield FIRST_STEPS
        for _ in range(ROUNDS):
            yield steps
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                yield steps
            profiled.append({event.key: event.self_cpu_time_total for event in profiler.key_averages()})

    open_side(name, case, folder, device="cpu", compiled=False).serve(counts(), windows.append)
    found = {
        kind: statistics.median(sum(times.get(key, 0) for key in keys) for times in profiled) / steps / 1e3
        for kind, keys in KERNELS.items()
    }
    return found | {WHOLE: statistics.median(windows[1::2]) / steps * 1e3}


def report(case: Case, ours: Mapping[str, float], best: Mapping[str, float]) -> str:
    """A Markdown table of both sides, and what its sums are of a step."""
    lines = [f"{case.name}, ms:", "", "| kernels | ours | diffusers' best |", "|---|---|---|"]
    lines += [f"| {kind} | {ours[kind]:.1f} | {best[kind]:.1f} |" for kind in (*KERNELS, WHOLE)]
    necessary = [sum(side[kind] for kind in NECESSARY) / side[WHOLE] for side in (ours, best)]
    shared = sum(min(ours[kind], best[kind]) for kind in KERNELS) / ours[WHOLE]
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
    names = [case.name for case in CASES]
    parser.add_argument("--case", nargs="+", choices=names, default=names)
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)  # of a process: name, folder
    options = parser.parse_args()
    keep_freed_memory()
    for case in CASES:
        if case.name not in options.case:
            continue
        if options.side:
            print(json.dumps(milliseconds(options.side[0], case, Path(options.side[1]))), flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            export(case, Path(folder))
            sides = [_process(name, case, folder) for name in ("ours", "best")]
        print(report(case, *sides), flush=True)


def _process(name: str, case: Case, folder: str) -> dict[str, float]:
    """`milliseconds` in a process of its own, whose last line they are."""
    command = [sys.executable, "-m", "benchmarks.kernels", "--case", case.name, "--side", name, folder]
    return json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )


if __name__ == "__main__":
    main()
