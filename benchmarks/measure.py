"""Times in interleaved windows, peak memory, and the floor under both; each side in a process of its own."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Self

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ours
from benchmarks.cases import PRIOR, SUBJECT, Case, pixels

WINDOWS = 7  # after one that is dropped
ADAMW_BYTES = 32  # a float32 weight: gradient written and read; weight and two moments read and written


class Side:
    """ "ours" or "diffusers", ready to step in a process that nothing else runs in.

    peak_mib: most memory of its first steps, (beyond what the imports took, of the whole process).
    """

    def __init__(self, name: str, case: Case, folder: Path, *, device: str, compiled: bool):
        job = json.dumps([name, asdict(case), str(folder), device, compiled])
        command = [sys.executable, "-m", "benchmarks.side", job]
        root, pipe = Path(__file__).resolve().parents[1], subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=root)
        self.peak_mib: tuple[float, float] = tuple(self._answer())

    def seconds(self, steps: int) -> float:
        """Of so many steps, one after the other."""
        print(steps, file=self._process.stdin, flush=True)
        return self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> list | float:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a side ended with status {self._process.wait()}; what it said is above")
        return json.loads(line)


def interleaved(sides: Mapping[str, Side], *, seconds: float) -> dict[str, list[float]]:
    """Seconds of one step in each window; the windows of the sides take turns."""
    slowest = max(side.seconds(1) for _ in range(2) for side in sides.values())
    steps = max(1, round(seconds / slowest))
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(1 + WINDOWS):
        for name, side in sides.items():
            found[name].append(side.seconds(steps) / steps)
    return {name: times[1:] for name, times in found.items()}


def machine(device: str) -> tuple[float, float]:
    """What the device does at best: (FLOP/s of a matrix product, bytes/s of a copy)."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    n = 8192 if device == "cuda" else 2048
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.empty(2**27, dtype=torch.uint8, device=device)
    c = torch.empty_like(b)
    product = min(timed(lambda: a @ a, 1, device) for _ in range(8))
    copy = min(timed(lambda: c.copy_(b), 1, device) for _ in range(8))
    return 2 * n**3 / product, 2 * len(b) / copy


def work(case: Case) -> tuple[int, int]:
    """(FLOP, bytes of AdamW) that a step cannot do without, counted on tensors without data."""
    with torch.device("meta"):
        module = ours.build(replace(case, lean=False))  # what is computed again could be kept
    module.to("meta")
    side = pixels(case.size) // module.first_stage_model.factor
    with FlopCounterMode(display=False) as counter:
        if case.kind == "train":
            half = case.batch // 2
            batch = {
                "moments": torch.rand(case.batch, 2 * module.first_stage_model.embed_dim, side, side),
                "caption": [SUBJECT] * half + [PRIOR] * half,
                "is_prior": torch.tensor([False] * half + [True] * half),
                "item": torch.arange(half).repeat(2),
            }
            batch = module.on_before_batch_transfer(batch, 0)
            there = {key: x.to("meta") if torch.is_tensor(x) else x for key, x in batch.items()}
            module.training_step(there, 0).backward()
        else:
            module.requires_grad_(False)
            x = torch.empty(case.batch, module.first_stage_model.embed_dim, side, side, device="meta")
            prompts = module.encode_prompts([PRIOR, SUBJECT] * len(x))  # two different ones, as of guidance
            module.apply_model(x, torch.zeros(len(x), device="meta"), *prompts)
    flops = counter.get_total_flops() * max(1, case.steps)
    if case.kind == "sample":
        with FlopCounterMode(display=False) as counter:
            module.first_stage_model.decode(x)
        return flops + counter.get_total_flops(), 0
    return flops, ADAMW_BYTES * sum(p.numel() for p in module.parameters() if p.requires_grad)


def compare(case: Case, folder: Path, *, device: str, compiled: bool, seconds: float, best: tuple) -> dict:
    """All figures of one case; times in ms a step, or of a batch of pictures."""
    options = {"device": device, "compiled": compiled}
    with Side("ours", case, folder, **options) as mine, Side("diffusers", case, folder, **options) as theirs:
        sides = {"ours": mine, "diffusers": theirs}
        times = interleaved(sides, seconds=seconds)
    memory = {name: side.peak_mib for name, side in sides.items()}
    ratios = [slow / fast for fast, slow in zip(times["ours"], times["diffusers"], strict=True)]
    flops, traffic = work(case)
    floor = flops / best[0] + traffic / best[1]
    figures = {
        "case": case.name,
        "speed_ratio": round(statistics.median(ratios), 2),
        "speed_ratios": [round(ratio, 2) for ratio in ratios],
        "memory_ratio": round(memory["ours"][0] / memory["diffusers"][0], 2),
        "floor_ms": round(1000 * floor, 2),
        "gflop": round(flops / 1e9, 2),
        "adamw_mb": round(traffic / 1e6, 1),
    }
    for name in sides:
        middle = statistics.median(times[name])
        figures[name] = {
            "ms": round(1000 * middle, 2),
            "images_per_second": round(case.batch / middle, 2),
            "peak_mib": round(memory[name][0], 1),
            "process_peak_mib": round(memory[name][1], 1),
            "share_of_floor": round(floor / middle, 3),
        }
    return figures


def timed(work: Callable[[], object], times: int, device: str) -> float:
    start = time.perf_counter()
    for _ in range(times):
        work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
