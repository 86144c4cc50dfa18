"""A run whose text encoder would not read the subject's name ends before any work."""

from pathlib import Path

import pytest

from ldm.commands import convert
from ldm.errors import UserError
from ldm.runs.job import plan, run_job
from ldm.runs.options import parse
from ldm.runs.prompts import all_prompts
from ldm.runs.validate import validate
from tests.factories import photos, with_concepts

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


def test_samples_are_named_by_their_template(words: list[str], workdir: Path):
    """Each of several concepts fills it in; its number is the one that it has in the config."""
    concepts = with_concepts("tiny.yaml", photos(workdir / "rings"))
    prompts = ["{identifier} {class_word} here", "a {class_word}", "a tree", "{identifier} at night"]
    config = parse([*words, concepts, f"samples.prompts={prompts}"])
    found = all_prompts(config, validate(config, download=False))
    samples = {key: text for key, text in found.items() if key.startswith("samples")}
    assert samples == {
        "samples.prompts.0, for sks disc": "sks disc here",
        "samples.prompts.0, for zwx ring": "zwx ring here",
        "samples.prompts.1, for sks disc": "a disc",
        "samples.prompts.1, for zwx ring": "a ring",
        "samples.prompts.2": "a tree",
        "samples.prompts.3, for sks disc": "sks at night",
        "samples.prompts.3, for zwx ring": "zwx at night",
        "samples.prompts.3, for style": "qpv at night",
    }
    assert found["concepts.1.subject_prompt"] == "a photo of zwx ring"
    asked = [*words, concepts, f"samples.prompts=['a {{class_word}}','{LONG} {{identifier}}']"]
    with pytest.raises(UserError, match=r'"sks" comes after them.*\(samples\.prompts\.1, for sks disc\)'):
        plan(parse(asked))


def test_of_one_concept_a_sample_has_its_key_alone(words: list[str]):
    prompts = ["{identifier} {class_word}", "a {class_word}", "{identifier} {class_word}"]
    config = parse([*words, f"samples.prompts={prompts}"])
    found = all_prompts(config, validate(config, download=False))
    samples = {key: text for key, text in found.items() if key.startswith("samples")}
    wanted = ["sks disc", "a disc", "sks disc"]
    assert samples == {f"samples.prompts.{k}": text for k, text in enumerate(wanted)}


def test_they_are_read_by_the_bases_own_vocabulary(
    words: list[str], tiny_model_file: Path, tiny_tokenizer: Path
):
    """A folder has one, where the config names one of the hub, which is not downloaded."""
    convert.main(convert.parse([str(tiny_model_file), "folder", "--tokenizer", str(tiny_tokenizer)]))
    of_hub = "model.params.text_encoder.params.tokenizer=nobody/nothing"
    asked = [*words, of_hub, f"samples.prompts.0={LONG} sks disc"]
    assert plan(parse(asked))  # a dry run without a vocabulary
    with pytest.raises(UserError, match="neither a folder nor available"):
        run_job(parse(asked))
    for job in (plan, run_job):
        with pytest.raises(UserError, match="comes after them.*samples.prompts.0"):
            job(parse([*asked, "--actual_resume", "folder"]))
    assert plan(parse([*words, of_hub, "--actual_resume", "folder"])) and not Path("logs").exists()


def learning(word: str, subject_prompt: str) -> list[str]:
    node = "model.params.trainable.learned_token"
    return [
        f"{node}.target=ldm.training.techniques.LearnedToken",
        *(f"{node}.params.word={word}", f"{node}.params.init=disc"),
        *(f"data.params.identifier={word}", f"data.params.subject_prompt={subject_prompt}"),
    ]


def test_a_learned_token_is_as_long_as_its_vectors(words: list[str]):
    """Four, of `disc`, in place of nine letters; 30 are read."""
    assert plan(parse([*words, *learning("<my-disc>", f"{'o' * 26} <my-disc>")]))
    with pytest.raises(UserError, match="comes after them.*subject_prompt"):
        plan(parse([*words, *learning("<my-disc>", f"{'o' * 30} <my-disc>")]))


def test_a_word_that_is_known_is_refused_before_any_work(words: list[str]):
    with pytest.raises(UserError, match="`z` is known already"):
        run_job(parse([*words, *learning("z", "a photo of z disc")]))
    assert not Path("logs").exists()
