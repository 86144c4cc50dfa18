"""See `ldm/commands/check_photos.py`, and --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed
from ldm.commands import check_photos

if __name__ == "__main__":
    sys.exit(check_photos.command())
