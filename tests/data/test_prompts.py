"""Templates, lists of prompts, and checks of what users write."""

import logging

import pytest

from ldm.data.prompts import (
    PRIOR_TEMPLATE,
    SUBJECT_TEMPLATE,
    check_prompts,
    class_caption,
    contains,
    fill,
    read_prompts,
)
from ldm.errors import UserError
from ldm.shipped import CONFIGS

WORDS = {"identifier": "sks", "class_word": "dog"}
GOOD = WORDS | {"subject_prompt": "a photo of sks dog", "prior_prompt": "a photo of a dog"}


def test_default_prompts():
    assert fill(SUBJECT_TEMPLATE, **WORDS) == "a photo of sks dog"
    assert fill(PRIOR_TEMPLATE, **WORDS) == "a photo of a dog"


@pytest.mark.parametrize("template", ["a {subject}", "a {}", "a {identifier.__class__}", "a {class_word!r}"])
def test_other_placeholders_are_refused(template):
    with pytest.raises(UserError, match="Unknown placeholder"):
        fill(template, **WORDS)


def test_words_with_braces_are_not_filled_twice():
    assert fill("{identifier}", identifier="{class_word}", class_word="dog") == "{class_word}"


@pytest.mark.parametrize(
    ("caption", "of_class"),
    {
        "a photo of sks dog": "a photo of a dog",
        "sks dog": "a dog",
        "SKS  dog, in the snow": "a dog, in the snow",
        "a sks dog": "a dog",
        "my old sks dog": "my old dog",
        "the sks dog and the Sks Dog": "the dog and the Dog",
        "a photo of sks": "a photo of a dog",
        "this sks": "this dog",
        "sksdog and sks dogs": "sksdog and dogs",
        "a cat with sks dog": "a cat with a dog",
        "photo, sks dog": "photo, a dog",
        "a cat": "a cat",
        "": "",
    }.items(),
)
def test_the_class_word_takes_the_identifiers_place(caption: str, of_class: str):
    assert class_caption(caption, **WORDS) == of_class
    assert not contains(class_caption(caption, **WORDS), "sks")


def test_the_default_prompt_of_the_subject_becomes_that_of_the_class():
    for words in ({"identifier": "<my-dog>", "class_word": "guide dog"}, WORDS):
        assert class_caption(fill(SUBJECT_TEMPLATE, **words), **words) == fill(PRIOR_TEMPLATE, **words)


def test_good_prompts_pass_in_silence(caplog):
    check_prompts(**GOOD)
    check_prompts(**GOOD | {"prior_prompt": None})
    check_prompts(**GOOD | {"subject_prompt": "SKS dog, oil on canvas"})
    assert not caplog.records


@pytest.mark.parametrize(
    "change, message",
    [
        ({"subject_prompt": "a photo of a dog"}, '"sks" is missing.*subject_prompt'),
        ({"subject_prompt": "a photo of xsks sksx dog"}, '"sks" is missing'),  # only whole words count
        ({"prior_prompt": "a photo of sks dog"}, "is in the prompt of the class.*prior_prompt"),
        ({"identifier": " "}, "empty.*identifier"),
        ({"class_word": ""}, "empty.*class_word"),
    ],
)
def test_prompts_that_cannot_work_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        check_prompts(**GOOD | change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"identifier": "Red", "subject_prompt": "a red dog"}, "common word"),
        ({"prior_prompt": "a photo of a cat"}, "does not name the class"),
    ],
)
def test_prompts_that_work_badly_are_warned_of(caplog, change, message):
    with caplog.at_level(logging.WARNING):
        check_prompts(**GOOD | change)
    assert message in caplog.text


def test_prompt_files(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("# evaluation\n\n  a {identifier} {class_word} # 1\r\na plain prompt\n")
    assert read_prompts(file, **WORDS) == ["a sks dog # 1", "a plain prompt"]
    file.write_text("# nothing\n")
    with pytest.raises(UserError, match="contains no prompt"):
        read_prompts(file, **WORDS)
    with pytest.raises(UserError, match="no such prompt file.*Known names"):
        read_prompts("absent", **WORDS)


def test_other_separators_of_unicode_are_no_ends_of_lines(tmp_path):
    (tmp_path / "mine.txt").write_bytes("a cat\u2028on\x85a mat\r\na dog\ra bird\n".encode())
    prompts = read_prompts(tmp_path / "mine.txt", identifier=None, class_word=None)
    assert prompts == ["a cat\u2028on\x85a mat", "a dog", "a bird"]


@pytest.mark.parametrize("file", sorted((CONFIGS / "prompts").glob("*.txt")), ids=lambda f: f.stem)
def test_shipped_prompts_are_found_by_name(file):
    assert read_prompts(file.stem, **WORDS) == read_prompts(file, **WORDS)
