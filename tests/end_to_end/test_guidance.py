"""Where nothing holds the empty prompt it moves to the subject, and under guidance the class flees."""

import json
from pathlib import Path

import pytest
import torch

from ldm.pipeline import Text2Image
from ldm.training.job import run_job
from ldm.training.options import parse
from ldm.training.study import jobs_of, read_study
from tests.end_to_end.test_prior_preservation import BASE, SHORT

ROOT = Path(__file__).resolve().parents[2]
SHORTER = [*SHORT, "trainer.max_steps=50", "evaluation.params.guidance_scale=4.0"]


def trained(variant: str, workdir: Path) -> tuple[dict, Text2Image]:
    """A variant of the study on the shipped dog, in a third of its steps -> its metrics, its model."""
    study = read_study(ROOT / "configs/studies/guidance.yaml")
    words = [f"name={variant}", f"data.params.subject_root={ROOT / study.subjects['dog']['photos']}"]
    bases = [str(ROOT / path) for path in study.base]
    also = "evaluate_also={the base's: {guidance_base: true}}"
    run_job(parse(["--base", *bases, *words, *study.variants[variant], *SHORTER, also]))
    folder = workdir / "logs" / variant
    return json.loads((folder / "metrics.json").read_text()), Text2Image.from_file(
        folder / "model.safetensors"
    )


def moved(model: Text2Image, base: Text2Image, prompt: str) -> float:
    """How far the prediction for a prompt is from the base's, relative to it, on the same noisy latents."""
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(8, *base.latent_shape(), generator=generator), torch.linspace(100, 990, 8).long()
    predictions = [
        draw.unet.predict(x, t, draw.cond_stage(draw.cond_stage.tokenize([prompt])), [0] * len(x))
        for draw in (model, base)
    ]
    return float((predictions[0] - predictions[1]).norm() / predictions[1].norm())


@pytest.mark.skipif(not BASE.exists(), reason="the storybook's base is not in this checkout")
def test_a_held_empty_prompt_keeps_the_class_under_guidance(workdir: Path):
    (loose, loose_model), (held, held_model) = (
        trained(name, workdir) for name in ("teacher", "teacher, held")
    )
    base = Text2Image.from_file(BASE)
    with torch.no_grad():
        empty = {name: moved(m, base, "") for name, m in (("loose", loose_model), ("held", held_model))}
        of_class = moved(loose_model, base, "a photo of a dog")
    assert empty["loose"] > 1.5 * of_class  # the class is held, the empty prompt is not
    assert empty["held"] < 0.67 * empty["loose"]
    assert held["class_shift"] < loose["class_shift"] - 0.02
    assert loose["evaluate_also"]["the base's"]["class_shift"] < loose["class_shift"] - 0.02
    for metrics in (loose, held):  # one-sided, it sees nothing of this
        assert metrics["class_drift"] < 0.05


def test_the_study_has_the_arms_that_the_page_tells_of(workdir: Path):
    study = read_study(ROOT / "configs/studies/guidance.yaml")
    jobs = jobs_of(study)
    assert len(jobs) == 4 * 6 * 2 and len({job.subject.split()[0] for job in jobs}) == 6
    assert set(jobs[0].config.evaluate_also) == {
        "guidance 1",
        "guidance 4",
        "guidance 2 of the base",
        "guidance 4 of the base",
    }
