"""Bad inputs, and what each gets: `pytest tests/hostile --reliability FILE` writes the table into FILE."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from ldm.errors import UserError
from ldm.files import write_section

EXAMPLES = int(os.environ.get("HOSTILE_EXAMPLES", "20"))  # of each kind of model file
HOSTILE = settings(  # the same examples every time
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ROWS: dict[tuple[str, str], str] = {}  # (kind, input) -> what it gets


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reliability", type=Path, help="Markdown file whose section `hostile` gets the table")


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("reliability", default=None)
    if path is None or not ROWS:
        return
    cell = str.maketrans({"|": "\\|", "\n": " "})
    rows = [f"| {kind} | {what} | {got.translate(cell)} |" for (kind, what), got in sorted(ROWS.items())]
    write_section(path, "hostile", "\n".join(["| kind | input | gets |", "|---|---|---|", *rows]))


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
