"""docs/errors.md: what the tests try, and the sentence that each gets.

    python -m pytest --errors=docs/errors.md

A pytest plugin. With the option only tests that speak of a refusal run, and every UserError that the library
makes in one of them is taken down, under the words of that test.
"""

import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from ldm.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
INTRODUCTION = """# Error messages

Written by `python -m pytest --errors=docs/errors.md`: every error message that a test of this project
gets, and what the test does to get it. Names, paths and numbers are those of the tests; search for the
words around yours. The last sentence of a message says what to do. Errors come before long work, or leave
its results on disk; `main.py` and the scripts print them without a traceback, with exit status 2."""
ROOMS = {  # package or module of ldm -> heading; others come last
    "config": "Configs",
    "data": "Photos, prompts, prior images",
    "checkpoints": "Model files, LoRAs, embeddings",
    "model_file": "Model files, LoRAs, embeddings",
    "models": "Networks",
    "diffusion": "Schedules and samplers",
    "pipeline": "Sampling",
    "runs": "Runs",
    "engine": "Training",
    "optim": "Optimizers",
    "training": "Training",
    "evaluation": "Metrics",
    "storybook": "The storybook",
    "files": "Disks and folders",
}
OTHERS = "Commands"
SPEAKS_OF_ONE = re.compile(r"UserError|refus|outcome\(")
CHANGING = {  # what differs between two runs of one test -> what stands for it
    r"[^\s'\"`(]*/pytest-of-[^/]+/pytest-\d+/(popen-gw\d+/)?[^/\s'\"`)]+/?": "",
    re.escape(f"{ROOT}/"): "",
    r"\d+(\.\d+)? (bytes|GiB)": r"… \2",
    r"\b0x[0-9a-f]+\b": "…",
    r"process \d+": "process …",
}
LONGEST = 240  # characters of a sentence
TESTS = 2  # at most so many are named for one message


class Seen(NamedTuple):
    """A message in one test: heading, what is wrong, key and remedy (or ""), the test in words, its file."""

    room: str
    what: str
    key: str
    remedy: str
    tried: str
    file: str


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--errors", type=Path, help="Markdown file that gets all error messages of the tests")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("errors") is not None:
        config.pluginmanager.register(Collector(config.getoption("errors")))


class Collector:
    """Takes the messages down in each test; they travel with its report, from other processes too."""

    def __init__(self, page: Path):
        self.page = page
        self.of_test: list[tuple[str, str, str, str]] = []
        self.seen: set[Seen] = set()
        self.begin = UserError.__init__
        UserError.__init__ = self._init_of_errors()

    def _init_of_errors(self) -> object:
        def begin(error: UserError, what: str, *, where: object = None, remedy: str | None = None) -> None:
            self.begin(error, what, where=where, remedy=remedy)
            module = sys._getframe(1).f_globals["__name__"]
            key = where if isinstance(where, str) and re.fullmatch(r"[\w.*]+", where) else ""
            room = ROOMS.get((module.split(".") + [""])[1], OTHERS)
            if not module.startswith("tests."):  # which make some of their own
                self.of_test.append((room, settled(what.removesuffix(".")), key, settled(remedy or "")))

        return begin

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Tests of any values are left out: the next version of Hypothesis tries others."""

        def wanted(item: pytest.Item) -> bool:
            drawn = getattr(item.function, "is_hypothesis_test", False)
            return not drawn and SPEAKS_OF_ONE.search(inspect.getsource(item.function)) is not None

        left_out = [item for item in items if not wanted(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if wanted(item)]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        self.of_test.clear()
        yield
        file = item.path.relative_to(ROOT).as_posix()
        item.user_properties += [("error", [*error, in_words(item), file]) for error in self.of_test]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.seen |= {Seen(*value) for name, value in report.user_properties if name == "error"}

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        UserError.__init__ = self.begin
        if not hasattr(session.config, "workerinput"):  # not in xdist's processes
            self.page.write_text(page(self.seen), encoding="utf-8")


def in_words(item: pytest.Item) -> str:
    """A test's name and, where it is written in words, the case."""
    name = item.function.__name__.removeprefix("test_").replace("_", " ")
    cases = list(item.callspec.params.values()) if hasattr(item, "callspec") else []
    worded = (
        len(cases) == 1 and isinstance(cases[0], str) and re.fullmatch(r"\w[\w ,'-]* [\w ,'-]*", cases[0])
    )
    return f"{name}: {cases[0]}" if worded else name


def page(seen: Iterable[Seen]) -> str:
    """The page in Markdown: one row for all messages that differ in names and numbers alone."""
    rooms: dict[str, dict[str, set[Seen]]] = defaultdict(lambda: defaultdict(set))
    for one in seen:
        rooms[one.room][pattern(one.what)].add(one)
    parts = [INTRODUCTION]
    for room in [*dict.fromkeys(ROOMS.values()), OTHERS]:
        if room in rooms:
            rows = sorted(map(_row, rooms[room].values()), key=_place)
            parts.append("\n".join([f"## {room}", "", "| message | what is tried |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _place(row: str) -> tuple[str, str]:
    """Rows are in the order of their letters and digits; of equals, of all their characters."""
    return re.sub(r"\W", "", row).lower(), row


def _row(group: set[Seen]) -> str:
    """The shortest message of a group, with a key where one has one, and tests that get any of them."""
    best = min(group, key=lambda one: (not one.key, len(one.what + one.remedy), one))
    tests = dict.fromkeys(
        (one.tried, one.file) for one in sorted(group, key=lambda one: (one.what != best.what, one))
    )
    tried = "; ".join(f"{cell(tried)} (`{file}`)" for tried, file in list(tests)[:TESTS])
    place = f" ({best.key})" if best.key else ""
    return f"| {cell(f'{best.what}{place}. {best.remedy}')} | {tried} |"


def settled(text: str) -> str:
    """A sentence without what changes from run to run."""
    for changing, constant in CHANGING.items():
        text = re.sub(changing, constant, text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def pattern(what: str) -> str:
    """What messages of one kind share: no quoted words, no numbers, no file names, no names of classes."""
    what = re.sub(r"`[^`]*`|'[^']*'|\"[^\"]*\"|\([^)]*\)", "…", what)
    return re.sub(r"\S*([\d/\[\]_{}]|\w\.\w|[a-z][A-Z])\S*", "…", what)


def cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return re.sub(r"([|<*])", r"\\\1", " ".join(text.split()))
