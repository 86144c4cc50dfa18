"""Flags of other tools are answered with what is written here, and that is right."""

import re

import pytest

from ldm.data.buckets import Buckets, Shape, shapes_of
from ldm.errors import UserError
from ldm.runs.command import ALIASES, read_command
from ldm.runs.old_flags import FLAGS, OVERRIDES, remedies
from ldm.runs.options import parse
from ldm.shipped import PACKAGE

SD1 = ["--base", "configs/dreambooth-sd1.yaml", "configs/presets/8gb-lora.yaml"]


def test_every_override_is_a_key_of_a_real_config():
    parse([*SD1, "--class_word", "dog", *OVERRIDES.values()])


def test_every_flag_of_the_page_is_answered():
    lines = (PACKAGE.parent / "docs/from_other_tools.md").read_text(encoding="utf-8").split("\n")
    theirs = [line.split("|")[1] for line in lines if line.startswith("| `-")]
    flags = {flag for cell in theirs for flag in re.findall(r"(?<![\w-])--?[\w-]+", cell)}
    assert len(flags) > 40 and flags <= remedies().keys()


def test_the_sides_of_buckets_suit_their_size():
    config = parse([*SD1, "--class_word", "dog", *OVERRIDES.values()])
    node, size = config.data["params"]["buckets"], config.data["params"]["size"]
    assert size == 512 and Shape(256, 1024) in shapes_of(Buckets(**node), size, unit=node["unit"])


@pytest.mark.parametrize("flag", [*OVERRIDES, *FLAGS, "-t", "--no-test", "-l", "--debug", "-p"])
@pytest.mark.parametrize("how", ["{}", "{} 1", "{}=1"])
def test_a_flag_is_answered(flag, how):
    if flag.startswith("--") or "=" not in how:
        with pytest.raises(UserError) as error:
            read_command(["--base", "a.yaml", *how.format(flag).split()], description=None)
        assert error.value.remedy == remedies()[flag]
        assert error.value.what.startswith(f"`{flag}")


def test_flags_of_ours_exist_and_are_not_shadowed():
    ours = {f"--{name}" for name in ALIASES} | {"--base", "--resume", "--allow", "--dry_run"}
    assert {words.split()[0] for words in FLAGS.values()} <= ours
    assert not ours & remedies().keys()


def test_an_unknown_flag_is_said_as_before():
    with pytest.raises(UserError, match="`--lerning_rate=1` is not an option.*key.sub=value"):
        read_command(["--base", "a.yaml", "--lerning_rate=1"], description=None)


@pytest.mark.parametrize("words", [["--dry_run"], ["--resume", "rex"], ["--allow_config_change"]])
def test_a_command_that_does_not_train_takes_no_option_of_training(words):
    """Prior images would be generated in spite of --dry_run."""
    with pytest.raises(UserError, match=f"`{words[0]}` is not an option"):
        read_command(["--base", "a.yaml", *words], description=None, trains=False)
    assert read_command(["--base", "a.yaml"], description=None, trains=False).paths == ["a.yaml"]
