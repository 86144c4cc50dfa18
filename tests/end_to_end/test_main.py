"""main.py from a config to a folder of results, on a tiny model."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm.errors import UserError
from ldm.runs.job import run_job
from ldm.runs.options import parse
from ldm.storybook.subjects import SUBJECTS, write_subject
from tests.factories import run_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def job(workdir: Path, tiny_config: dict, tiny_model_file: Path, subject_folder: Path) -> list[str]:
    """Command-line arguments of a DreamBooth job of 3 steps."""
    config = run_config(
        tiny_config,
        base=tiny_model_file,
        subject=subject_folder,
        name="tiny",
        checkpoint_every=1,
        trainer={"max_steps": 3, "val_check_interval": 1},
        samples={"n": 2, "every_steps": 2},
    )
    OmegaConf.save(OmegaConf.create(config), workdir / "tiny.yaml")
    return ["--base", "tiny.yaml"]


def run(script: str, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / script, *words], capture_output=True, text=True)


OURS = (
    r"tiny.yaml: PyTorch is being loaded",
    r"\[\d/\d\] [A-Z].*",
    r"(prior images|images|encoding|training): .*",
    r".*/\d+.png is held out for validation",
    r"The first step took [\d.]+ s",
    r"warning: .*(enlarged to|sks|tokens).*",
)


def assert_only_our_lines(text: str) -> None:
    """Nothing of a library, and the phases in order, each once."""
    lines = [line for line in re.split(r"[\n\r]+", text) if line.strip()]
    assert [line for line in lines if not any(re.fullmatch(ours, line) for ours in OURS)] == []
    numbers = [tuple(map(int, found)) for found in re.findall(r"^\[(\d)/(\d)\]", text, re.M)]
    assert numbers == [(k + 1, len(numbers)) for k in range(len(numbers))] and len(numbers) >= 5


def scalars(folder: Path) -> set[str]:
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    return set(board.Tags()["scalars"])


def test_a_run_leaves_its_results_and_a_resumed_one_the_same_weights(job: list[str]):
    done = run("main.py", *job)
    assert done.returncode == 0, done.stderr
    folder = Path("logs/tiny")
    *_, samples, model, report, following = done.stdout.splitlines()
    for line in (samples, model, report):
        assert folder in Path(line[9:]).parents and Path(line[9:]).exists()
    assert following[:9].strip() == "next" and "scripts/sample.py --model logs/tiny --prompt" in following
    assert_only_our_lines(done.stderr)
    losses = {"train/subject_loss", "train/prior_loss", "val/subject_loss", "val/loss"}
    others = {"train/grad_norm", "train/images_per_second", "train/peak_memory_mib", "lr/unet"}
    assert losses | others <= scalars(folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["prior_images"] == 3 and set(metrics["seconds"]) >= {"prior_images", "training"}
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "a photo of sks disc" in page and page.count("data:image/") >= 4 + 3 + 4
    assert "main.py --base tiny.yaml</dd>" in page and "<dd>3, each of 2 photos</dd>" in page
    assert "<dd>trainable.learning_rate 0.001</dd>" in page and "tiny.safetensors, sha256" in page
    names = {p.name for p in (folder / "samples").iterdir()}
    assert names == {"00-00.png", "00-01.png", "before", "contact_sheet.png", "step-000002.png"}

    stopped = run("main.py", *job, "trainer.max_steps=2", "name=stopped")
    assert stopped.returncode == 0, stopped.stderr
    resumed = run("main.py", "--resume", "logs/stopped", "trainer.max_steps=3", "--allow_config_change")
    assert resumed.returncode == 0, resumed.stderr
    whole, again = (load_file(f"logs/{name}/model.safetensors") for name in ("tiny", "stopped"))
    base = load_file(OmegaConf.load("tiny.yaml").base_checkpoint)
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    trained = {key for key in whole if not torch.equal(whole[key], base[key])}
    assert {key.split(".")[0] for key in trained} == {"model", "cond_stage_model"}

    drawn = run("scripts/generate_priors.py", *job)
    assert "0 generated, 3 were there" in drawn.stdout, drawn.stderr
    sampled = run("scripts/sample.py", "--prompt", "a photo of sks disc", "--n", "1", "--steps", "2")
    assert sampled.returncode == 0, sampled.stderr
    assert Path(sampled.stdout.split()[-1]).name == "contact_sheet.png"


def test_online_priors_a_teacher_and_a_new_word(job: list[str]):
    """All through one job, stopped and taken up; its pictures need the word that stands beside the model."""
    words = ["data.params.online_priors=true", "model.params.objective.prior_target=teacher"]
    words += ["data.params.prior_caption_dropout=0.5"]
    words += [
        "data.params.identifier=<my-disc>",
        "model.params.trainable.learned_token.params.word=<my-disc>",
    ]
    words += ["model.params.trainable.learned_token.target=ldm.training.techniques.LearnedToken"]
    words += ["model.params.trainable.learned_token.params.init=disc"]
    paths = [path for path in run_job(parse([*job, *words]))]
    assert all(path.exists() for path in paths)
    (priors,) = Path("priors").iterdir()
    # to validate; two new ones a step, and Lightning asks for a batch ahead
    assert len(list(priors.glob("*.png"))) == 3 + (3 + 1) * 2
    run_job(parse([*job, *words, "name=stopped", "priors.folder=others", "trainer.max_steps=1"]))
    again = [*job, *words, "name=stopped", "priors.folder=others", "trainer.max_steps=3"]
    run_job(parse(again), "logs/stopped", allow_config_change=True)
    (embedding,) = Path("logs/tiny/embeddings").iterdir()
    for name in ("model.safetensors", f"embeddings/{embedding.name}"):
        whole, again = (load_file(f"logs/{run}/{name}") for run in ("tiny", "stopped"))
        assert all(torch.equal(whole[key], again[key]) for key in whole) and whole.keys() == again.keys()
    sampled = run("scripts/sample.py", "--prompt", "a photo of <my-disc> disc", "--n", "1", "--steps", "2")
    assert sampled.returncode == 0, sampled.stderr


def test_a_run_without_prior_images(job: list[str]):
    paths = run_job(parse([*job, "data.params.num_priors=0", "model.params.objective.l2_sp_weight=0.1"]))
    assert all(path.exists() for path in paths) and not Path("priors").exists()
    assert json.loads(Path("logs/tiny/metrics.json").read_text())["prior_images"] == 0


def test_figures_on_the_way_choose_the_weights(job: list[str]):
    write_subject(Path("dogs"), SUBJECTS["dog"], photos=2)
    words = ["data.params.subject_root=dogs", "data.params.class_word=dog"]
    words += ["evaluation.target=ldm.evaluation.storybook.StorybookEvaluation"]
    words += [f"evaluation.params.{key}" for key in ("seeds=1", "class_samples=2", "steps=2")]
    words += ["online_eval.every_steps=1", "online_eval.params.steps=1", "export.weights=best"]
    words += ["evaluate_also={no guidance: {guidance_scale: 1.0}, the base's: {guidance_base: true}}"]
    words += ["samples.guidance_base=true"]
    run_job(parse([*job, *words]))
    folder = Path("logs/tiny")
    metrics = json.loads((folder / "metrics.json").read_text())
    rows = metrics["measures"]
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        lost = max(0.0, row["class_drift"], row["class_shift"])
        wanted = row["subject_fidelity"] * row["prompt_fidelity"] - lost
        assert row["score"] == pytest.approx(wanted, abs=1e-3)
    unmoved = metrics["evaluate_also"]["no guidance"]
    assert unmoved["class_shift"] == unmoved["class_shift_unguided"] == metrics["class_shift_unguided"]
    assert set(metrics["evaluate_also"]["the base's"]["noise_floor"]) == set(metrics["noise_floor"])
    best = max(rows, key=lambda row: row["score"])["step"]
    assert metrics["best_step"] == best and metrics["measures_seconds"] > 0
    model = load_file(folder / "model.safetensors")
    kept = torch.load(folder / f"checkpoints/step-{best:08d}.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(model[key], kept[key]) for key in kept if key in model)
    assert {"measure/score", "measure/subject_fidelity"} <= scalars(folder)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f"The score was best after step {best}" in page
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "| steps | 3 |" in card and (f"| weights | of step {best}, the best" in card) == (best < 3)
    assert "With other sampling" in page and "no guidance" in page
    assert set(metrics["measures_noise_floor"]) == set(metrics["noise_floor"])
    assert page.count("(noise floor ") >= len(rows)


@pytest.mark.parametrize(
    "words, message",
    [
        (["model.params.trainable.lerning_rate=1"], "learning_rate"),
        (["data.params.subject_root=nowhere"], "nowhere"),
        (["base_checkpoint=nowhere.safetensors"], "nowhere.safetensors"),
        (["data.params.subject_prompt=a photo of a disc"], "sks"),
        (["trainer.max_steps=soon"], "max_steps"),
        (["--frobnicate"], "--frobnicate"),
        (["data.params.size=18"], "18"),
        (["online_eval.every_steps=1"], "needs an `evaluation`"),
        (["evaluate_also={g: {guidance_scale: 4.0}}"], "needs an `evaluation`"),
        (
            [
                "evaluation.target=ldm.evaluation.storybook.StorybookEvaluation",
                "evaluate_also={g: {scale: 4}}",
            ],
            "`scale` is not a parameter",
        ),
        (["data.params.num_priors=0", "data.params.prior_caption_dropout=0.5"], "prior_target=teacher"),
        (["data.params.num_priors=0", "data.params.diff_output_preservation=true"], "prior_target=teacher"),
        (["data.params.diff_output_preservation=true"], "num_priors=0"),
        (["data.params.online_priors=true", "data.params.num_priors=0"], "online_priors"),
    ],
)
def test_bad_input_is_found_before_any_work(job: list[str], words: list[str], message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        run_job(parse([*job, *words]))
    assert not Path("priors").exists()


def test_the_command_says_one_sentence_and_exits_with_2(job: list[str]):
    done = run("main.py", *job, "model.params.trainable.lerning_rate=1")
    assert done.returncode == 2
    assert "learning_rate" in done.stderr and "Traceback" not in done.stderr
