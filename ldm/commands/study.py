"""Run a study: every variant of a config on every subject with every seed, then its table, plots and page.

    study.py --base configs/studies/prior_preservation.yaml --processes 2
    study.py --base configs/studies/guidance*.yaml     two, also on more machines with this folder in common

Every config is checked before the first run. Finished runs are kept and found again, in other studies too;
interrupted ones are resumed, and each process takes the next that no other works on. When all are there,
writes studies/NAME.csv, .md and .svg.
"""

from argparse import SUPPRESS, Namespace
from collections.abc import Sequence
from pathlib import Path

from ldm.commands.entry import parser_of, run


def parse(words: Sequence[str] | None = None) -> Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--base", nargs="+", required=True, metavar="YAML", help="studies")
    add("--processes", type=int, default=1, help="processes that share the runs (1)")
    add("--allow", action="append", default=[], metavar="PACKAGE", help="let configs name your own classes")
    add("--out", type=Path, default=Path("studies"), help="folder of the results (studies)")
    add("--worker", action="store_true", help=SUPPRESS)  # one of `processes`
    return parser.parse_args(words)


def main(options: Namespace) -> None:
    """Runs what is left of the studies, and writes the files of those that are finished."""
    from ldm.engine import signals
    from ldm.runs import console
    from ldm.runs.sweep_results import run_study

    signals.stop_at_once()
    console.speak()
    run_study(options)


def command() -> int:
    return run(lambda: main(parse()))
