"""A run whose text encoder would not read the subject's name ends before any work."""

from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.runs.job import plan, run_job
from ldm.runs.options import parse

LONG = "a photo of a little round disc that lies on the grass"  # 42 letters for 30 places


@pytest.mark.parametrize(
    "word, where",
    [
        (f"data.params.subject_prompt={LONG} sks", "subject_prompt"),
        (f"samples.prompts.0={LONG} sks disc", "samples.prompts.0"),
    ],
)
def test_a_job_says_it_before_any_work(words: list[str], word: str, where: str):
    with pytest.raises(UserError, match=f"comes after them.*{where}"):
        run_job(parse([*words, word]))
    assert not Path("priors").exists() and not Path("logs").exists()
    with pytest.raises(UserError, match=f"comes after them.*{where}"):
        plan(parse([*words, word]))


def test_a_caption_of_a_job_too(words: list[str], subject_folder: Path):
    (subject_folder / "3.txt").write_text(f"{LONG} sks")
    with pytest.raises(UserError, match=r"comes after them.*3\.txt"):
        run_job(parse([*words, "data.params.captions=true"]))
    assert not Path("logs").exists()


def test_a_learned_token_counts_as_its_vectors_and_a_known_one_is_refused(words: list[str]):
    learned = "model.params.trainable={learning_rate: 0.001, learned_token: {word: sks, init: disc}}"
    assert "learned_token" in plan(parse([*words, learned]))
    with pytest.raises(UserError, match="known already"):
        run_job(parse([*words, learned.replace("sks", "a"), "data.params.identifier=a"]))
    assert not Path("logs").exists()
