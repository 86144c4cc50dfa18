"""See `ldm/commands/dreambooth.py`, and --help."""

import sys

from ldm.commands import dreambooth

if __name__ == "__main__":
    sys.exit(dreambooth.command())
