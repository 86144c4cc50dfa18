"""docs/errors.md is written from the tests; here, in seconds, whether it still speaks of what there is."""

import ast
import re
from itertools import permutations
from pathlib import Path

import pytest

from tests.errors_page import INTRODUCTION, ROOT, Seen, page, settled

COMMAND = "python -m pytest --errors=docs/errors.md"


@pytest.fixture(scope="module")
def text() -> str:
    return (ROOT / "docs/errors.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def rows(text: str) -> list[tuple[str, str]]:
    """Message and tests of each row."""
    lines = re.findall(r"^\| .*\(`tests/.*$", text, re.M)
    return [re.fullmatch(r"\| (.*) \| (.*) \|", line).groups() for line in lines]


def spoken() -> list[str]:
    """The fixed pieces of all text in the library and its commands, as they stand in a cell."""
    files = [*(ROOT / "ldm").rglob("*.py"), *(ROOT / "scripts").glob("*.py"), ROOT / "main.py"]
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return [" ".join(text.split()) for text in texts if len(text.strip()) > 4]


def test_the_page_names_its_command(text: str, rows: list):
    assert text.startswith(INTRODUCTION) and COMMAND in INTRODUCTION and len(rows) > 200


def test_every_test_that_it_names_is_there(rows: list):
    named = {
        named for _, tests in rows for named in re.findall(r"(?:^|; )([^(]+?)(?::[^(]*)? \(`(\S+)`\)", tests)
    }
    assert len(named) > 100
    functions = {
        file: set(re.findall(r"^ *def (\w+)", (ROOT / file).read_text(encoding="utf-8"), re.M))
        for _, file in named
    }
    gone = [
        f"{file}: {words}"
        for words, file in named
        if f"test_{words.replace(' ', '_')}" not in functions[file]
    ]
    assert gone == [], f"run {COMMAND}"


def test_every_message_is_still_said(rows: list):
    pieces = spoken()
    gone = [said for said, _ in rows if not any(piece in said.replace(chr(92), "") for piece in pieces)]
    assert gone == [], f"run {COMMAND}"


def test_nothing_in_it_is_of_one_run(text: str, rows: list):
    assert re.findall(r"pytest-of-\w+|0x[0-9a-f]{6,}|/tmp/\S+|" + re.escape(str(Path.home())), text) == []
    assert len({said for said, _ in rows}) > 0.98 * len(rows)


def seen(what: str, *, key: str = "", tried: str = "a test") -> Seen:
    return Seen("Configs", settled(what), key, "Do it", tried, "tests/test_x.py")


def test_messages_that_differ_in_names_and_numbers_are_one_row(tmp_path: Path):
    of_one_kind = [
        seen("`size` is 3", key="size"),
        seen("`seed` is 400"),
        seen(f"`x` is {tmp_path / '5'}", tried="b"),
    ]
    rows = [row for row in page(of_one_kind + [seen("There is a | here")]).splitlines() if "(`tests" in row]
    assert rows == [
        "| `size` is 3 (size). Do it | a test (`tests/test_x.py`); b (`tests/test_x.py`) |",
        "| There is a \\| here. Do it | a test (`tests/test_x.py`) |",
    ]


@pytest.mark.parametrize("said", ["in {}/a b", "{}/x/y.png is", "({})"])
def test_no_temporary_path_is_left(tmp_path: Path, said: str):
    assert "pytest" not in settled(said.format(tmp_path))


def test_the_page_does_not_depend_on_the_order_of_tests():
    """Nor on which process ran them."""
    found = [seen("There is a | here"), seen("There is a here"), seen("There is a here", tried="b")]
    assert {page(order) for order in permutations(found)} == {page(found)}
