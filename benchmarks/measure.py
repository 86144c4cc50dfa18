"""Times in interleaved windows, peak memory, and the floor under both; each side in a process of its own."""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Self

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ours
from benchmarks.cases import PRIOR, SUBJECT, Case, pixels
from benchmarks.timing import timed

SIDES = ("ours", "script", "best")
WINDOWS, MOST_WINDOWS = 7, 25  # after one that is dropped; beyond the least, as many as fit
ROOM = 40  # into so many times the seconds of a window
LEAST_STEPS = 3  # of the UNet in a window
ADAMW_BYTES = 32  # a float32 weight: gradient written and read; weight and two moments read and written
LESS_BY_BF16 = 8  # two moments read and written


class Side:
    """One of SIDES, ready to step in a process that nothing else runs in.

    peak_mib: most memory of its first steps, without that of building the networks: (beyond what the imports
    took, of the whole process).
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


def interleaved(sides: Mapping[str, Side], *, seconds: float, least: int = 1) -> dict[str, list[float]]:
    """Seconds of one step in each window, of `least` steps or more; the windows of the sides take turns.

    seconds: of a window of the slowest side, if it is not of `least` steps.
    """
    slowest = max(side.seconds(1) for _ in range(2) for side in sides.values())
    steps = max(least, round(seconds / slowest))
    found: dict[str, list[float]] = {name: [] for name in sides}
    spent = 0.0
    for done in range(1 + MOST_WINDOWS):
        if done > WINDOWS and spent > ROOM * seconds:
            break
        for name, side in sides.items():
            taken = side.seconds(steps)
            found[name].append(taken / steps)
            spent += taken
    return {name: times[1:] for name, times in found.items()}


def machine(device: str) -> tuple[float, float]:
    """What the device does at best: (FLOP/s of a matrix product, bytes/s of a copy)."""
    cuda = device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    n = 8192 if cuda else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.empty(2**31 if cuda else 2**27, dtype=torch.uint8, device=device)
    c = torch.empty_like(b)
    product = min(_device_seconds(lambda: a @ a, device) for _ in range(8))
    copy = min(_device_seconds(lambda: c.copy_(b), device) for _ in range(8))
    return 2 * n**3 / product, 2 * len(b) / copy


def _device_seconds(work: Callable[[], object], device: str) -> float:
    """Of one call, on a GPU by its own clock: neither launch nor wait belongs to what it does at best."""
    if device != "cuda":
        return timed(work, 1, device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def work(case: Case) -> tuple[int, int]:
    """(FLOP, bytes of AdamW) that a step cannot do without, counted on tensors without data."""
    params = ours.case_params(replace(case, lean=False))  # what is computed again could be kept
    module = ours.build(params, device="meta").to("meta")
    side = pixels(case.size) // module.networks["vae"].factor
    with FlopCounterMode(display=False) as counter:
        if case.kind == "train":
            batch = ours.Batches(module, size=case.size, batch=case.batch)[0]
            batch = module.on_before_batch_transfer(batch, 0)
            module.training_step(module.transfer_batch_to_device(batch, module.device, 0), 0).backward()
        else:
            module.requires_grad_(False)
            x = torch.empty(case.batch, module.networks["vae"].embed_dim, side, side, device="meta")
            told = module.condition([PRIOR, SUBJECT] * len(x))  # two different ones, as of guidance
            module.apply_model(x, torch.zeros(len(x), device="meta"), told)
    flops = counter.get_total_flops() * max(1, case.steps)
    if case.kind == "sample":
        with FlopCounterMode(display=False) as counter:
            module.networks["vae"].decode(x)
        return flops + counter.get_total_flops(), 0
    each = ADAMW_BYTES - (LESS_BY_BF16 if case.moments else 0)
    return flops, each * sum(p.numel() for p in module.parameters() if p.requires_grad)


def compare(case: Case, folder: Path, *, device: str, compiled: bool, seconds: float, best: tuple) -> dict:
    """All figures of one case; times in ms a step, or of a batch of pictures."""
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(Side(name, case, folder, device=device, compiled=compiled))
            for name in SIDES
        }
        least = -(-LEAST_STEPS // max(1, case.steps))
        times = interleaved(sides, seconds=seconds, least=least)
    memory = {name: side.peak_mib for name, side in sides.items()}
    flops, traffic = work(case)
    floor = flops / best[0] + traffic / best[1]
    metrics: dict[str, object] = {"case": case.name}
    for peer in SIDES[1:]:
        ratios = [theirs / mine for mine, theirs in zip(times["ours"], times[peer], strict=True)]
        metrics[f"speed_ratio_{peer}"] = round(statistics.median(ratios), 2)
        metrics[f"speed_ratios_{peer}"] = [round(ratio, 2) for ratio in ratios]
        metrics[f"memory_ratio_{peer}"] = round(memory["ours"][0] / memory[peer][0], 2)
    metrics |= {
        "floor_ms": round(1000 * floor, 2),
        "gflop": round(flops / 1e9, 2),
        "adamw_mb": round(traffic / 1e6, 1),
    }
    for name in sides:
        middle = statistics.median(times[name])
        metrics[name] = {
            "ms": round(1000 * middle, 2),
            "images_per_second": round(case.batch / middle, 2),
            "peak_mib": round(memory[name][0], 1),
            "process_peak_mib": round(memory[name][1], 1),
            "share_of_floor": round(floor / middle, 3),
        }
    return metrics
