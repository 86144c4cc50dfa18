"""See `ldm/commands/dreambench.py`, and --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed
from ldm.commands import dreambench

if __name__ == "__main__":
    sys.exit(dreambench.command())
