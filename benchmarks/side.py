"""One side in its own process: says its peak memory, then how long as many steps as a line asks for take."""

import gc
import itertools
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch

from benchmarks import ours
from benchmarks.cases import Case
from benchmarks.timing import Answer
from ldm.engine.device import keep_freed_memory, peak_resident_mib, set_matmul_precision
from ldm.engine.peak import reset_peak_memory

FIRST_STEPS = 3  # optimizer states are there after one, what the allocator keeps after some more


class Side(Protocol):
    def serve(self, counts: Iterator[int], answer: Answer) -> None: ...


def open_side(name: str, case: Case, folder: Path, *, device: str, compiled: bool) -> Side:
    """ "ours", "script" or "best" (see `benchmarks.peer`), ready to step; what samples is never compiled."""
    how = {"device": device} | ({"compiled": compiled} if case.kind == "train" else {})
    if name == "ours":
        return ours.Training.of_case(case, **how) if case.kind == "train" else ours.Sampling(case, **how)
    from benchmarks import peer  # not in the process that measures our memory

    kind = peer.Training if case.kind == "train" else peer.Sampling
    return kind(case, folder, best=name == "best", **how)


def main(name: str, case: dict, folder: str, device: str, compiled: bool) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
    set_matmul_precision("high")
    keep_freed_memory()  # a setting of the C library, which helps all sides alike
    if name != "ours":
        import benchmarks.peer  # noqa: F401  (its memory is no part of the step's)
    before = peak_resident_mib()
    side = open_side(name, Case(**case), Path(folder), device=device, compiled=compiled)
    gc.collect()
    reset_peak_memory()  # of building the networks

    def say(what: object) -> None:
        print(json.dumps(what), file=answers, flush=True)

    def counts() -> Iterator[int]:
        """The first steps, after which the peak is said, and then what is asked for."""
        yield FIRST_STEPS
        peak = [peak_resident_mib() - before, peak_resident_mib()]
        say([torch.cuda.max_memory_reserved() / 2**20] * 2 if device == "cuda" else peak)
        for line in sys.stdin:
            yield int(line)

    windows = itertools.count()
    side.serve(counts(), lambda seconds: say(seconds) if next(windows) else None)  # not of the first steps


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
