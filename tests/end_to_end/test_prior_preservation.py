"""Prior preservation does what it is for: the same training without it turns the class into the subject."""

import json
from pathlib import Path

import pytest

import main
from ldm.training.options import parse

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "ldm/storybook/assets/base.safetensors"

SHORT = [  # a quarter of the shipped run's steps, at a rate that makes up for it
    *("trainer.max_steps=50", "model.params.learning_rate=4e-4", "data.params.num_priors=32"),
    *("trainer.enable_progress_bar=false", "trainer.accelerator=cpu", "trainer.val_check_interval=1000"),
    *("priors.steps=12", "samples.n=1", "samples.steps=2", "samples.every_steps=0"),
    *("evaluation.params.seeds=1", "evaluation.params.class_samples=32", "evaluation.params.steps=12"),
]


def figures(prior_loss_weight: int) -> dict[str, float]:
    name = f"weight-{prior_loss_weight}"
    words = [f"name={name}", f"model.params.prior_loss_weight={prior_loss_weight}", *SHORT]
    config, _ = parse(["--base", str(ROOT / "configs/dreambooth.yaml"), *words], description="")
    main.main(config)
    return json.loads(Path("logs", name, "metrics.json").read_text())


@pytest.mark.skipif(not BASE.exists(), reason="the storybook's base is not in this checkout")
def test_without_prior_preservation_the_class_drifts(workdir: Path):
    without, preserved = figures(0), figures(1)
    assert without["class_drift"] > preserved["class_drift"] + 0.1
    assert without["diversity_ratio"] < preserved["diversity_ratio"]
