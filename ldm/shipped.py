"""Files that ship with the code, found from any folder, in a clone and installed."""

import os.path
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
CONFIGS = (
    PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"
)  # wheel, clone


def find_file(name: str | Path) -> Path:
    """A path as given or, if nothing is there, the file of this name that ships: `configs/...`, `ldm/...`.

    What exists in the current folder wins. A name that is nowhere comes back as it was given.
    """
    given = Path(name)
    roots = {"configs": CONFIGS.parent, PACKAGE.name: PACKAGE.parent}
    root = roots.get(given.parts[0]) if given.parts else None
    exists = os.path.exists  # `Path.exists` raises for names that are too long
    if exists(given) or root is None or not exists(root / given):
        return given
    return root / given
