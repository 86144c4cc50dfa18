"""scripts/evaluate.py on folders of plain pictures and on mistakes."""

import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from ldm.annotations import Node
from ldm.commands import evaluate
from ldm.config import check, load_config
from ldm.errors import UserError
from ldm.evaluation import vlm
from ldm.evaluation.storybook import StorybookEvaluation
from ldm.runs import evaluate_model
from ldm.shipped import find_file
from ldm.storybook.subjects import new_subject, write_subject
from ldm.storybook.world import CONTEXTS, draw, same_subject

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


def place(*words: str, model: str | None = None) -> str:
    return str(evaluate_model.results_folder(evaluate.parse(words), None if model is None else Path(model)))


def test_results_lie_where_no_others_do(workdir):
    """Of runs, of their checkpoints, of other metrics, and of what only has the same name."""
    for name in ("rex", "tom"):
        Path("logs", name, "checkpoints").mkdir(parents=True)
        Path("logs", name, "config.yaml").touch()
        assert place(model=f"logs/{name}/model.safetensors") == f"logs/{name}/evaluation"
        checkpoint = f"logs/{name}/checkpoints/step-00000400.ckpt"
        of_checkpoint = f"logs/{name}/evaluation/step-00000400"
        assert place(model=checkpoint) == of_checkpoint
        assert place("--metrics", "vlm", model=checkpoint) == f"{of_checkpoint}/vlm"
    run_model = "logs/rex/model.safetensors"
    asked = [("--metrics", "photos"), ("--metrics", "vlm"), ("--captions", "8"), ()]
    folders = [place(*words, model=run_model) for words in asked]
    assert folders == [f"logs/rex/evaluation{name}" for name in ("/photos", "/vlm", "/captions", "")]
    assert place("--out", "here", "--metrics", "vlm", model=run_model) == "here"
    assert place("--pictures", "one/samples") == "logs/evaluation-samples"
    assert place("--pictures", "two/samples") == "logs/evaluation-samples-2"
    assert place(model="other/samples.safetensors") == "logs/evaluation-samples-3"


def test_where_nothing_can_be_written_nothing_is_measured(folders, monkeypatch):
    monkeypatch.setattr(evaluate_model, "evaluate", lambda *given: pytest.fail("measured"))
    with pytest.raises(UserError, match="drawn/0.png"):
        run(monkeypatch, "--pictures", "drawn", *PHOTOS, "--out", "drawn/0.png/results")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--pictures", "cats"), "The subject_root is missing"),
        (("--pictures", "absent", *PHOTOS), "absent"),
        (("--pictures", "drawn", "--class_pictures", "photos/one", *PHOTOS), "photos/one"),
        (("--pictures", "drawn", "--captions", "4"), "Captions are drawn by a model.*--captions"),
        (("--class_pictures", "cats", *PHOTOS), "beside those of the subject.*--pictures"),
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
        find_file(evaluate_model.BASE),
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


SAMPLES = {"sampler": "dpm++2m", "steps": 3, "guidance_scale": 2.0, "guidance_base": True}
OWN_SAMPLER = {"sampler": {"target": "ldm.diffusion.samplers.euler", "params": {}}, "spacing": "karras"}


@pytest.fixture
def a_run(folders: Path) -> Path:
    """A run on the storybook's base that was never measured."""
    folder = folders / "logs" / "cat"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").symlink_to(find_file(evaluate_model.BASE))
    photos = {"subject_root": str(folders / "photos"), "class_word": "cat"}
    config = load_config([find_file("configs/dreambooth.yaml")])
    own = {"name": "cat", "data": {"params": photos}, "evaluation": None, "samples": SAMPLES}
    OmegaConf.save(OmegaConf.merge(config, own), folder / "config.yaml")
    return folder


FEW = ("--seeds", "1", "--class_samples", "2")


@pytest.mark.parametrize("words, changed", [((), {}), (("--steps", "2"), {"steps": 2})])
def test_a_run_without_an_evaluation_is_measured_as_it_samples(a_run, monkeypatch, capsys, words, changed):
    run(monkeypatch, "--model", a_run, *FEW, *words)
    metrics = json.loads((a_run / "evaluation/metrics.json").read_text())
    wanted = SAMPLES | changed
    assert {name: metrics["sampling"][name] for name in wanted} == wanted
    assert metrics["sampling"]["seeds"] == 1 and metrics["sampling"]["class_samples"] == 2
    printed = capsys.readouterr().out
    assert "sampler dpm++2m" in printed and "guidance_scale 2.0" in printed
    assert f"steps {wanted['steps']}" in printed and "guidance_base True" in printed


def test_a_run_is_measured_against_the_parts_of_its_base(a_run, monkeypatch):
    """A run that learnt nothing is its base, also where another file has that one's UNet."""
    path, finer = find_file(evaluate_model.BASE), a_run / "finer.safetensors"
    with safe_open(path, "pt") as file:
        weights, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    weights |= {name: w * 1.1 for name, w in weights.items() if name.startswith("model.diffusion_model.")}
    save_file(weights, finer, metadata)
    (a_run / "model.safetensors").unlink()
    (a_run / "model.safetensors").symlink_to(finer)
    shifts = []
    for parts in ({"unet": str(finer)}, None):
        config = OmegaConf.load(a_run / "config.yaml")
        OmegaConf.save(OmegaConf.merge(config, {"base_parts": parts}), a_run / "config.yaml")
        run(monkeypatch, "--model", a_run, *FEW)
        shifts.append(json.loads((a_run / "evaluation/metrics.json").read_text())["class_shift"])
    assert shifts[0] == 0 < shifts[1]


def test_networks_are_where_the_options_say(a_run, monkeypatch):
    placed = []

    def from_file(path: Path, **how: object) -> None:
        placed.append(how)
        raise UserError("far enough", where=path)

    monkeypatch.setattr(evaluate_model.Text2Image, "from_file", from_file)
    monkeypatch.setattr(evaluate_model, "base_pipeline", from_file)
    monkeypatch.setattr(evaluate_model, "use_device", lambda device: None)  # as if they were here
    for words in (["--device", "cuda"], ["--device", "cpu"], ["--captions", 2, "--device", "cuda:1"]):
        with pytest.raises(UserError, match="far enough"):
            run(monkeypatch, "--model", a_run, *FEW, "--base", a_run / "model.safetensors", *words)
    low, full = torch.bfloat16, torch.float32
    wanted = [("cuda", low), ("cpu", full), ("cuda:1", low)]
    assert [(how["device"], how["dtype"]) for how in placed] == wanted


def test_a_runs_own_evaluation_comes_before_its_samples(a_run):
    config = evaluate_model.run_config(a_run / "model.safetensors")
    own = {"target": evaluate_model.METRICS["storybook"], "params": {"guidance_scale": 3.0}}
    options = evaluate.parse([])
    assert (
        evaluate_model.evaluation_of(options, replace(config, evaluation=own)).sampling["guidance_scale"]
        == 3.0
    )
    assert (
        evaluate_model.evaluation_of(options, replace(config, evaluation=own)).sampling["sampler"] == "ddim"
    )
    assert evaluate_model.evaluation_of(options, config).sampling["guidance_scale"] == 2.0
    assert evaluate_model.evaluation_of(options, None).sampling["guidance_scale"] == 4.0


@pytest.mark.parametrize("target", evaluate_model.METRICS.values())
def test_every_evaluation_takes_what_a_run_says_of_its_samples(a_run, target):
    config = OmegaConf.merge(OmegaConf.load(a_run / "config.yaml"), {"samples": OWN_SAMPLER})
    OmegaConf.save(config, a_run / "config.yaml")
    params = evaluate_model.sampling_of(evaluate_model.run_config(a_run / "model.safetensors"))
    assert params["sampler"] == OWN_SAMPLER["sampler"] and params["spacing"] == "karras"
    check({"evaluation": {"target": target, "params": params}}, {"evaluation": Node})


class Even:
    """A judge that finds all ratings as likely."""

    name = "even"

    def __init__(self, *given: object, **how: object):
        pass

    def placed(self) -> AbstractContextManager[None]:
        return nullcontext()

    def rating_logits(self, questions: Sequence[str], images: Sequence) -> torch.Tensor:
        return torch.zeros(len(questions), 5)


def test_a_run_is_rated_by_a_language_model_as_it_samples(a_run, monkeypatch, capsys):
    """Also by a sampler of one's own, which the table calls by its name."""
    monkeypatch.setattr(vlm, "shared_model", Even)
    Path("one.txt").write_text("a {identifier} {class_word}\n")
    config = OmegaConf.merge(OmegaConf.load(a_run / "config.yaml"), {"samples": OWN_SAMPLER})
    OmegaConf.save(config, a_run / "config.yaml")
    run(monkeypatch, "--model", a_run, "--metrics", "vlm", "--prompts", "one.txt", "--seeds", "2")
    metrics = json.loads((a_run / "evaluation/vlm/metrics.json").read_text())
    assert metrics["vlm_subject"] == metrics["vlm_prompt"] == 2 and metrics["judge"] == "even"
    wanted = SAMPLES | OWN_SAMPLER
    assert {name: metrics["sampling"][name] for name in wanted} == wanted
    assert "sampler ldm.diffusion.samplers.euler, spacing karras" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, wanted",
    [((), (25, 4.0)), (("--guidance_scale", 0), (25, 0.0)), (("--steps", 3, "--guidance_scale", 1), (3, 1))],
)
def test_captions_are_drawn_as_asked(workdir, monkeypatch, words, wanted):
    """Guidance 0 is one, and not the default."""
    asked = []

    def examine(self: StorybookEvaluation, pipeline: object, *, samples: int) -> dict[str, float]:
        asked.append((self.sampling["steps"], self.sampling["guidance_scale"]))
        return {"class": 1.0}

    monkeypatch.setattr(StorybookEvaluation, "examine", examine)
    run(monkeypatch, "--captions", 2, "--out", "here", *words)
    assert asked == [wanted]


@pytest.mark.parametrize(
    "words, message",
    [
        (("--class_word", "vase"), "does not know the class 'vase'.*--metrics photos"),
        (("--data_root", "discs"), "photos are not drawn by the storybook.*--metrics photos"),
    ],
)
def test_what_the_judge_cannot_judge_gets_no_figures(a_run, monkeypatch, words, message):
    Path("discs").mkdir()
    noise = Image.effect_noise((80, 60), 90)
    noise.save("discs/0.png")
    with pytest.raises(UserError, match=message):
        run(monkeypatch, "--model", a_run, *FEW, *words)
    assert not (a_run / "evaluation").exists()
