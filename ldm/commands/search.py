"""Search settings of a config, on several subjects and seeds, for the best score or a front of two metrics.

    search.py --base configs/dreambooth.yaml configs/searches/rates.yaml --processes 2

Any number of processes may run the same command and share the trials, also on several machines with a folder
in common. What is killed goes on when the command is run again. When all trials are done, or with --page at
any time, writes logs/search-NAME/search.html, trials.csv and the best settings as configs to run.
"""

import sys
from argparse import SUPPRESS, Namespace
from collections.abc import Sequence
from pathlib import Path

from ldm.commands.entry import parser_of, run


def parse(words: Sequence[str] | None = None) -> Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("search", metavar="SEARCH.yaml", help="what is searched")
    add("-b", "--base", action="append", required=True, metavar="YAML", help="config; again: more, merged")
    add("--processes", type=int, default=1, help="processes that share the trials (1)")
    add("--storage", type=Path, metavar="FILE", help=".db or .journal (logs/search-NAME/trials.journal)")
    add("--allow", action="append", default=[], metavar="PACKAGE", help="let configs name your own classes")
    add("--page", action="store_true", help="write the page of what there is; run nothing")
    add("--worker", action="store_true", help=SUPPRESS)  # one of `processes`
    return parser.parse_args(words)


def main(words: Sequence[str]) -> None:
    """Does what is left of the search, and writes its page and configs."""
    options = parse(words)
    from ldm.engine import signals
    from ldm.runs import console
    from ldm.runs.search_results import run_search

    signals.stop_at_once()
    console.speak()
    run_search(options, words)


def command() -> int:
    return run(lambda: main(sys.argv[1:]))
