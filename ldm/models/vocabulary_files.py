"""CLIP's vocabulary in a folder: vocab.json and merges.txt, or tokenizer.json, as by transformers 5."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.files import parse_json

FILES = ("vocab.json", "merges.txt")
WHOLE = "tokenizer.json"
VERSION = "#version: 0.2"  # first line of merges.txt


def has_vocabulary(folder: Path) -> bool:
    """Whether a tokenizer can be read from a folder."""
    return all((folder / name).is_file() for name in FILES) or (folder / WHOLE).is_file()


def read_vocabulary(folder: Path) -> dict[str, int]:
    """Token -> its id. Raises UserError for a folder without a vocabulary, or with a damaged one."""
    if (folder / FILES[0]).is_file():
        return _json(folder / FILES[0])
    found = _bpe(folder).get("vocab")
    if not isinstance(found, dict):
        raise UserError("The tokenizer has no vocabulary", where=folder / WHOLE)
    return found


def write_vocabulary(folder: Path, target: Path) -> None:
    """Leaves vocab.json and merges.txt of a folder's vocabulary in another, as all tools read them."""
    if all((folder / name).is_file() for name in FILES):
        for name in FILES:
            shutil.copyfile(folder / name, target / name)
        return
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in _bpe(folder).get("merges", [])]
    text = json.dumps(read_vocabulary(folder), ensure_ascii=False)
    (target / FILES[0]).write_text(text, encoding="utf-8")
    (target / FILES[1]).write_text("\n".join([VERSION, *merges]) + "\n", encoding="utf-8")


def _bpe(folder: Path) -> Mapping[str, Any]:
    if not (folder / WHOLE).is_file():
        what = f"The tokenizer folder has neither {' and '.join(FILES)} nor {WHOLE}"
        raise UserError(what, where=folder)
    model = _json(folder / WHOLE).get("model")
    return model if isinstance(model, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError("The tokenizer cannot be read", where=path) from error
    if not isinstance(content, dict):
        raise UserError("The tokenizer cannot be read: it is no JSON object", where=path)
    return content
