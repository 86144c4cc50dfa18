"""One side in its own process: says its peak memory, then how long as many steps as a line asks for take."""

import json
import os
import sys
from pathlib import Path
from typing import Protocol

import torch

from benchmarks import ours
from benchmarks.cases import Case
from benchmarks.measure import timed
from ldm.training.device import peak_resident_mib, set_matmul_precision

FIRST_STEPS = 3  # optimizer states are there after one, what the allocator keeps after some more


class Steps(Protocol):
    def step(self) -> None: ...


def open_side(name: str, case: Case, folder: Path, *, device: str, compiled: bool) -> Steps:
    """ "ours" or "diffusers", ready to step."""
    kind = "Training" if case.kind == "train" else "Sampling"
    if name == "ours":
        return getattr(ours, kind)(case, device=device, compiled=compiled)
    from benchmarks import peer  # not in the process that measures our memory

    return getattr(peer, kind)(case, folder, device=device, compiled=compiled)


def main(name: str, case: dict, folder: str, device: str, compiled: bool) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    set_matmul_precision("high")
    if name == "diffusers":
        import benchmarks.peer  # noqa: F401  (its memory is no part of the step's)
    before = peak_resident_mib()
    side = open_side(name, Case(**case), Path(folder), device=device, compiled=compiled)
    for _ in range(FIRST_STEPS):
        side.step()
    peak = [peak_resident_mib() - before, peak_resident_mib()]
    if device == "cuda":
        peak = [torch.cuda.max_memory_reserved() / 2**20] * 2
    print(json.dumps(peak), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(timed(side.step, int(line), device)), file=answers, flush=True)


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
