"""Speed and memory side by side with diffusers: same weights, pictures, prompts, batch and precision.

Twice: its script and pipeline as its users run them, and the same networks at their best, see
`benchmarks/peer.py`.

    python scripts/benchmark.py             a CPU: networks of reduced size; a GPU: Stable Diffusion 1.5
    python scripts/benchmark.py --quick     one case of each kind, a minute

Needs the `test` extra. Writes a JSON file and a plot, prints a table.
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed
from ldm.commands.entry import parser_of, run


def parse() -> Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="one small case of each kind, short windows")
    add("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    add("--compile", action="store_true", help="compile the UNet on both sides; only the cases that train")
    add("--only", nargs="+", default=[], metavar="TEXT", help="cases whose name holds one of these")
    add("--seconds", type=float, default=3.0, help="of a window of the slower side (3)")
    add("--out", type=Path, default=Path("benchmarks"), help="folder of the JSON file and the plot")
    return parser.parse_args()


def main() -> None:
    options = parse()
    from benchmarks import beside_diffusers  # not before: --help need not wait for torch

    beside_diffusers.main(options)


if __name__ == "__main__":
    sys.exit(run(main))
