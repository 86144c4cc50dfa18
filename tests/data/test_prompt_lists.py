"""The prompts of the DreamBooth benchmark (Ruiz et al. 2023)."""

from pathlib import Path

import pytest

from ldm.data.prompts import read_prompts
from ldm.errors import UserError

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "prompts"
WORDS = {"identifier": "sks", "class_word": "dog"}


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("dreambooth-object", "a sks dog floating in an ocean of milk"),
        ("dreambooth-live", "a sks dog wearing a black top hat and a monocle"),
    ],
)
def test_there_are_25_of_each(name, own):
    prompts = read_prompts(name, **WORDS)
    assert len(prompts) == len(set(prompts)) == 25
    assert own in prompts and all("sks dog" in prompt for prompt in prompts)
    assert prompts[0] == "a sks dog in the jungle" and prompts[-1] == "a cube shaped sks dog"
    assert "CC BY 4.0" in (FOLDER / f"{name}.txt").read_text(encoding="utf-8")


def test_the_first_ten_and_the_last_five_are_common():
    things, living = (read_prompts(f"dreambooth-{kind}", **WORDS) for kind in ("object", "live"))
    assert things[:10] == living[:10] and things[20:] == living[20:]
    assert not set(things[10:20]) & set(living[10:20])


def test_a_word_that_nobody_gave_is_asked_for():
    with pytest.raises(UserError, match=r"no value for \{class_word\}.*Give class_word"):
        read_prompts("dreambooth-live", identifier="sks", class_word=None)
