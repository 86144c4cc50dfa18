"""Speed and memory side by side with diffusers: same weights, pictures, prompts, batch and precision.

Twice: its script and pipeline as its users run them, and the same networks at their best, see
`benchmarks/peer.py`.

    python scripts/benchmark.py             a CPU: networks of reduced size; a GPU: Stable Diffusion 1.5
    python scripts/benchmark.py --quick     one case of each kind, a minute

Needs the `test` extra. Writes a JSON file and a plot, prints a table.
"""

import argparse
import logging
import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed
from benchmarks.cases import cases
from benchmarks.measure import SIDES, compare, machine
from benchmarks.ours import export
from benchmarks.pages import PEERS, speed_table
from benchmarks.plot import plot
from ldm.errors import UserError
from ldm.files import write_section
from ldm.runs.run import write_json

COLUMNS = ("script", "best", "memory", "best", "ours ms", "script ms", "best ms", "MiB", "floor ms", "share")


def parse() -> argparse.Namespace:
    shows_defaults = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shows_defaults, allow_abbrev=False)
    add = parser.add_argument
    add("--quick", action="store_true", help="one small case of each kind, short windows")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compile", action="store_true", help="compile the UNet on both sides")
    add("--only", nargs="+", default=[], metavar="TEXT", help="cases whose name holds one of these")
    add("--seconds", type=float, default=3.0, help="of a window of the slower side (3)")
    add("--out", type=Path, default=Path("benchmarks"), help="folder of the JSON file and the plot")
    return parser.parse_args()


def row(metrics: Mapping) -> str:
    """A line of the table, the ratios first."""
    numbers = [metrics[f"{what}_ratio_{peer}"] for what in ("speed", "memory") for peer in ("script", "best")]
    numbers += [metrics[side]["ms"] for side in SIDES]
    numbers += [metrics["ours"]["peak_mib"], metrics["floor_ms"], metrics["ours"]["share_of_floor"]]
    return "".join(f"{number:>11.2f}" for number in numbers) + f"  {metrics['case']}"


def main(options: argparse.Namespace) -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    seconds = 0.2 if options.quick else options.seconds
    chosen = cases(options.device, quick=options.quick)
    if options.only:
        chosen = [case for case in chosen if any(text in case.name for text in options.only)]
    if not chosen:
        raise UserError(f"No case holds {' or '.join(options.only)}", remedy="Try --only train.")
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
    name = f"{options.device}{'-compiled' if options.compile else ''}{'-quick' if options.quick else ''}"
    print(write_json(options.out / f"{name}.json", about | {"results": results}))
    picture = options.out / f"{name}.svg"
    groups = {
        metrics["case"]: {label: metrics[f"speed_ratio_{peer}"] for peer, label in PEERS.items()}
        for metrics in results
    }
    picture.write_text(plot(groups, "Times as fast as diffusers", line=1.0), encoding="utf-8")
    print(picture)
    if (options.out / "speed.md").exists() and name == "cpu" and not options.only:
        write_section(options.out / "speed.md", "measured", speed_table(about, results))
        print(options.out / "speed.md")


if __name__ == "__main__":
    try:
        main(parse())
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
