"""docs/config.md is what the signatures say, and says something of every key."""

from pathlib import Path

import pytest

from ldm.models.unet import UNetModel
from ldm.runs import config_page
from ldm.schema import RunConfig, SamplesConfig

PAGE = Path(__file__).resolve().parents[2] / "docs/config.md"
KINDS = [RunConfig, *(kind for _, kind in config_page._section_classes()), *config_page.NODES.values()]


def test_the_page_is_up_to_date():
    command = "python -m ldm.runs.config_page docs/config.md"
    assert PAGE.read_text(encoding="utf-8") == config_page.page(), f"run {command}"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_key_has_a_meaning(kind: type):
    assert [key.name for key in config_page.keys_of(kind) if not key.meaning] == []


def test_keys_have_the_defaults_and_ranges_of_the_signature():
    keys = {key.name: key for key in config_page.keys_of(SamplesConfig)}
    assert keys["n"] == ("n", "int (at least 1)", "`4`", "images of each prompt.")
    assert keys["spacing"].default == "`null`" and keys["spacing"].kind.endswith("karras or null")
    required = [key.name for key in config_page.keys_of(RunConfig) if key.default == "required"]
    assert required == ["trainer", "name", "seed", "model", "data"]
    levels = {key.name: key for key in config_page.keys_of(UNetModel)}["channel_mult"]
    assert levels.default == "`[1, 2, 4, 4]`" and levels.meaning.startswith("width of each level")


def test_a_meaning_ends_where_the_next_key_begins():
    class Example:
        """Does this: something else.

        one, two: of both. three: has a colon: here, and "one: not a key" too.
        """

    found = config_page.meanings_of(Example, {"one": 1, "two": 2, "three": 3})
    assert found == {
        "one": "of both.",
        "two": "of both.",
        "three": 'has a colon: here, and "one: not a key" too.',
    }
