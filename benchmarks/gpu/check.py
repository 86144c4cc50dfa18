"""One part of the check: `python -m benchmarks.gpu.check PART [WORD...]`, see check.sh for all of them.

A result is a line of $OUT/results.jsonl. CHECK_DEVICE=cpu CHECK_SIZE=storybook runs the same code on a CPU.
Words choose among the cases of `train`, `agree`, `caps`, `compiled`, `sample`, `syncs` and `peer` those whose
names hold one of them; those of `whole` and `storybook_base` go on to main.py.
"""

import importlib
import logging
import sys
import time
import warnings

PARTS = {  # part -> module of this package
    "env": "environment",
    "agree": "agreement",
    "train": "training",
    "graph": "agreement",
    "sample": "drawing",
    "peer": "runs",
    "syncs": "runs",
    "micro": "environment",
    "optimizer": "training",
    "caps": "training",
    "compiled": "training",
    "resume": "runs",
    "whole": "runs",
    "storybook_base": "storybook_base",
}


def main(part: str, *words: str) -> int:
    """Runs a part -> the exit status."""
    if part not in PARTS:
        print(f"error: there is no part {part!r}. Known: {', '.join(PARTS)}.", file=sys.stderr)
        return 2
    from benchmarks.gpu import record  # not before: a wrong word need not wait for torch

    record.PART = part
    if record.CUDA:
        import torch

        if not torch.cuda.is_available():
            print("error: there is no CUDA device; CHECK_DEVICE=cpu runs what a CPU can.", file=sys.stderr)
            return 2
    warnings.filterwarnings("ignore", message=".*self.log.*")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    module = importlib.import_module(f"benchmarks.gpu.{PARTS[part]}")
    began = time.perf_counter()
    try:
        getattr(module, part)(*words)
    finally:
        record.say("all of the part", seconds=time.perf_counter() - began)
    return 0


if __name__ == "__main__":
    sys.exit(main(*(sys.argv[1:] or ["env"])))
