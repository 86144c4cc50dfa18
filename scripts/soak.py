"""Kills a DreamBooth job at random moments, resumes it, and compares what it leaves with an undisturbed run.

    python scripts/soak.py --kills 100 [--base configs/dreambooth.yaml] [key.sub=value ...]

Every attempt is a process that does what `main.py --resume auto` does, forked after the imports, so that
SIGKILL strikes the work: after a random time or, more often, just as a file is being written, of the kinds
that were struck least so far. Some are stopped and continued before (SIGSTOP, SIGCONT); beside some,
scripts/generate_priors.py generates the same prior images, and is killed too. The networks are the config's,
made small, with random weights. The status is 1 if a single bit differs.
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--base", nargs="+", default=["configs/dreambooth.yaml"], metavar="YAML")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--report", type=Path, help="Markdown file whose section `soak` gets the figures")
    parser.add_argument("--add", action="store_true", help="the figures are added to those of the report")
    options, overrides = parser.parse_known_args()
    from benchmarks.soak import work  # not before: --help need not wait for torch

    sys.exit(work(options, overrides))
