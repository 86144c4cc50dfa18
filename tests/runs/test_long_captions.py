"""A run whose text encoder would not read the subject's name ends before any work."""

from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.runs.job import run_job
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
    assert not Path("priors").exists()


def test_a_caption_of_a_job_too(words: list[str], subject_folder: Path):
    (subject_folder / "3.txt").write_text(f"{LONG} sks")
    with pytest.raises(UserError, match=r"comes after them.*3\.txt"):
        run_job(parse([*words, "data.params.captions=true"]))
