"""Prior preservation does what it is for: the same training without it turns the class into the subject."""

import json
from pathlib import Path

import pytest

from ldm.runs.job import run_job
from ldm.runs.options import parse

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "ldm/storybook/assets/base.safetensors"

SHORT = [  # a seventh of the shipped run's steps, at rates that make up for it
    "trainer.max_steps=30",
    "trainer.val_check_interval=1000",
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
    "model.params.trainable.learning_rate=6e-4",
    "model.params.trainable.text_encoder_learning_rate=3.6e-4",
    "ema_decay=0.8",
    "data.params.num_priors=16",
    "priors.steps=8",
    "samples.n=1",
    "samples.steps=2",
    "samples.every_steps=0",
    "evaluation.params.seeds=1",
    "evaluation.params.class_samples=16",
    "evaluation.params.steps=8",
    "online_eval.every_steps=0",
]


def metrics(prior_loss_weight: int) -> dict[str, float]:
    name = f"weight-{prior_loss_weight}"
    photos = ROOT / "ldm/storybook/assets/subjects/dog"
    words = [
        f"name={name}",
        f"data.params.subject_root={photos}",
        f"model.params.objective.prior_loss_weight={prior_loss_weight}",
        *SHORT,
    ]
    run_job(parse(["--base", str(ROOT / "configs/dreambooth.yaml"), *words]))
    return json.loads(Path("logs", name, "metrics.json").read_text())


@pytest.mark.skipif(not BASE.exists(), reason="the storybook's base is not in this checkout")
def test_without_prior_preservation_the_class_drifts(workdir: Path):
    without, preserved = metrics(0), metrics(2)
    assert without["class_drift"] > preserved["class_drift"] + 0.3
    assert without["diversity_ratio"] < preserved["diversity_ratio"] - 0.2
