"""Speed and memory beside diffusers: what `scripts/benchmark.py` does."""

import logging
import os
import platform
import tempfile
from argparse import Namespace
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.cases import Case, cases
from benchmarks.measure import SIDES, compare, machine
from benchmarks.ours import export
from benchmarks.pages import PEERS, speed_table
from benchmarks.plot import plot
from ldm.errors import UserError
from ldm.files import write_section
from ldm.runs.run import write_json

COLUMNS = ("script", "best", "memory", "best", "ours ms", "script ms", "best ms", "MiB", "floor ms", "share")


def row(metrics: Mapping) -> str:
    """A line of the table, the ratios first."""
    numbers = [metrics[f"{what}_ratio_{peer}"] for what in ("speed", "memory") for peer in ("script", "best")]
    numbers += [metrics[side]["ms"] for side in SIDES]
    numbers += [metrics["ours"]["peak_mib"], metrics["floor_ms"], metrics["ours"]["share_of_floor"]]
    return "".join(f"{number:>11.2f}" for number in numbers) + f"  {metrics['case']}"


def chosen_cases(options: Namespace) -> list[Case]:
    """Those that the options name. A compiled UNet is one that trains: ours is never compiled to sample.

    Raises UserError where there are none.
    """
    found = cases(options.device, quick=options.quick)
    if options.compile:
        found = [case for case in found if case.kind == "train"]
    if options.only:
        found = [case for case in found if any(text in case.name for text in options.only)]
    if not found:
        raise UserError(f"No case holds {' or '.join(options.only)}", remedy="Try --only train.")
    return found


def main(options: Namespace) -> None:
    """Measures the cases that the options name; writes the JSON file, the plot and the page."""
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    seconds = 0.2 if options.quick else options.seconds
    chosen = chosen_cases(options)
    best, results = machine(options.device), []
    print(f"At best {best[0] / 1e9:,.0f} GFLOP/s and {best[1] / 1e9:,.1f} GB/s.")
    print("Ratios: diffusers' time over ours, our memory over diffusers'; its script, its networks at best.")
    print("".join(f"{name:>11}" for name in COLUMNS))
    with tempfile.TemporaryDirectory() as temporary:
        for case in chosen:
            folder = Path(temporary, case.size)
            if not folder.exists():
                export(case, folder, device=options.device)
            how = {"device": options.device, "compiled": options.compile, "seconds": seconds, "best": best}
            results.append(compare(case, folder, **how))
            print(row(results[-1]), flush=True)
    about = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
        "cores": os.cpu_count(),
        "precision": "bf16" if options.device == "cuda" else "fp32",
        "compiled": options.compile,
        "best_gflop_per_second": round(best[0] / 1e9, 1),
        "best_gb_per_second": round(best[1] / 1e9, 2),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    parts = {"compiled": options.compile, "quick": options.quick, "only": options.only}
    name = "-".join([options.device, *(part for part, is_so in parts.items() if is_so)])
    print(write_json(options.out / f"{name}.json", about | {"results": results}))
    picture = options.out / f"{name}.svg"
    groups = {
        metrics["case"]: {label: metrics[f"speed_ratio_{peer}"] for peer, label in PEERS.items()}
        for metrics in results
    }
    picture.write_text(plot(groups, "Times as fast as diffusers", line=1.0), encoding="utf-8")
    print(picture)
    if (options.out / "speed.md").exists() and name == "cpu":
        write_section(options.out / "speed.md", "measured", speed_table(about, results))
        print(options.out / "speed.md")
