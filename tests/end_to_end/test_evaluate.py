"""scripts/evaluate.py on folders of plain pictures and on mistakes."""

import json
import sys
from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.storybook.subjects import new_subject, write_subject
from ldm.storybook.world import CONTEXTS, draw, same_subject
from ldm.training.run import find_file
from scripts import evaluate

CAT = new_subject("cat", seed=51)


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    evaluate.main(evaluate.parse())


@pytest.fixture
def folders(workdir: Path) -> Path:
    """Photos of a cat, eight pictures of it with their prompts, and three of other cats."""
    write_subject(workdir / "photos", CAT)
    for name in ("drawn", "cats"):
        (workdir / name).mkdir()
    for k, (context, phrase) in enumerate(CONTEXTS.items()):
        draw(same_subject(CAT, context=context, seed=k)).save(workdir / f"drawn/{k}.png")
        (workdir / f"drawn/{k}.txt").write_text(f"a photo of sks cat {phrase}")
    for k in range(3):
        draw(new_subject("cat", seed=60 + k)).save(workdir / f"cats/{k}.png")
    return workdir


PHOTOS = ("--data_root", "photos", "--class_word", "cat")


def test_folders_of_pictures_are_measured(folders, monkeypatch, capsys):
    run(monkeypatch, "--pictures", "drawn", "--class_pictures", "cats", *PHOTOS)
    metrics = json.loads(Path("logs/evaluation-drawn/metrics.json").read_text())
    assert metrics["subject_fidelity"] > 0.95 and metrics["prompt_fidelity"] == 1
    assert metrics["class_carries_subject"] == 0 and metrics["class_diversity"] > 0
    assert "subject_fidelity" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--pictures", "cats"), "The subject_root is missing"),
        (("--pictures", "absent", *PHOTOS), "absent"),
        (("--pictures", "drawn", "--class_pictures", "photos/one", *PHOTOS), "photos/one"),
        (("--pictures", "drawn", *PHOTOS, "--metrics", "photos", "--dino", "absent"), "hf download"),
        (("--pictures", "drawn", *PHOTOS, "--prompts", "dreambooth-live"), "`prompts` is not a parameter"),
    ],
)
def test_mistakes_get_one_sentence(folders, monkeypatch, words, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
        run(monkeypatch, *words)


def test_a_model_is_measured_under_the_guidance_of_its_base(folders, monkeypatch, capsys):
    """The base under its own guidance is the base."""
    words = [
        "--model",
        find_file(evaluate.BASE),
        *PHOTOS,
        "--seeds",
        "1",
        "--class_samples",
        "3",
        "--steps",
        "2",
    ]
    run(monkeypatch, *words, "--guidance_base", "--out", "measured")
    metrics = json.loads(Path("measured/metrics.json").read_text())
    assert metrics["class_shift"] == metrics["class_drift"] == 0 and metrics["diversity_ratio"] == 1
    assert metrics["noise_floor"]["class_shift"] > 0
    assert "noise" in capsys.readouterr().out
