"""Bad inputs, and what each gets: `pytest tests/hostile --reliability FILE` writes the tables into FILE."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from ldm.errors import UserError
from ldm.files import read_section, write_section

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = int(os.environ.get("HOSTILE_EXAMPLES", "0"))  # of each kind; 0: few, the same ones every time
HOSTILE = settings(
    deadline=None,
    derandomize=not EXAMPLES,
    database=None,
    phases=(Phase.explicit, Phase.generate),  # what fails is small, and shrinking it takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ROWS: dict[tuple[str, str], str] = {}  # (kind, input) -> what it gets
DRAWN: dict[str, Counter] = defaultdict(Counter)  # kind -> how many inputs got "a result", "a refusal"
SECRET = "not-to-be-written-7f3a"  # the value of an environment variable


def examples(count: int) -> settings:
    """So many inputs of a kind are drawn, or HOSTILE_EXAMPLES."""
    return settings(HOSTILE, max_examples=EXAMPLES or count)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reliability", type=Path, help="Markdown file whose section `hostile` gets the table")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Rows of kinds that were not tried stay."""
    path = session.config.getoption("reliability", default=None)
    if path is None:
        return
    cell = str.maketrans({"|": "\\|", "\n": " "})
    if ROWS:
        rows = [
            f"| {kind} | {what} | {got.replace(f'{ROOT}/', '').translate(cell)} |"
            for (kind, what), got in ROWS.items()
        ]
        _replace_rows(path, "hostile", ["| kind | input | gets |", "|---|---|---|"], rows)
    if DRAWN:
        rows = [f"| {kind} | {n.total()} | {n['result']} | {n['refusal']} |" for kind, n in DRAWN.items()]
        head = ["| kind | inputs | a result | refused |", "|---|---|---|---|"]
        _replace_rows(path, "drawn", head, rows)


def _replace_rows(path: Path, section: str, head: list[str], rows: list[str]) -> None:
    tried = {row.split(" | ")[0] for row in rows}
    others = [
        row
        for row in read_section(path, section).splitlines()
        if row.startswith("| ") and row != head[0] and row.split(" | ")[0] not in tried
    ]
    write_section(path, section, "\n".join([*head, *sorted([*others, *rows])]))


def outcome(kind: str, what: str, work: Callable[[], str], *, hide: Path | None = None) -> str:
    """What `work` ends in, as a row of the table: the result that it tells, or the UserError.

    Any other exception fails the test. `hide` is left out of messages, for it changes from run to run.
    """
    try:
        got = work()
    except UserError as error:
        got = f"refused: {error}"
    got = got.replace(f"{hide}/", "") if hide else got
    ROWS[kind, what] = got if len(got) <= 300 else f"{got[:300]}…"
    return got


def refused_or(work: Callable[[], Any], *, where: object = None) -> Any:
    """The result of an input that was drawn, or None where it is refused; other exceptions fail the test.

    where: what the sentence has to name.
    """
    test = re.search(r"test_(\w+)", os.environ["PYTEST_CURRENT_TEST"].partition("::")[2])[1]
    kind = test.replace("_", " ")
    try:
        result = work()
    except UserError as error:
        assert str(error) and SECRET not in str(error)
        assert where is None or error.where == where
        DRAWN[kind]["refusal"] += 1
        return None
    DRAWN[kind]["result"] += 1
    return result


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment variable that no file may get."""
    monkeypatch.setenv("SECRET", SECRET)
