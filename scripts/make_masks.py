"""See `ldm/commands/make_masks.py`, and --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed
from ldm.commands import make_masks

if __name__ == "__main__":
    sys.exit(make_masks.command())
