"""Where a teacher holds the empty prompt, it and the guided prediction for the class move less."""

from pathlib import Path

import pytest
import torch

from ldm.models.conditioning import Conditioning
from ldm.pipeline import Text2Image
from ldm.runs.job import run_job
from ldm.runs.options import parse
from ldm.runs.sweep import read_sweep
from tests.end_to_end.test_prior_preservation import BASE, SHORT

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "configs/studies/guidance.yaml"
SHORTER = [*SHORT, "trainer.max_steps=50", "evaluation=null"]


def trained(variant: str) -> Path:
    """A variant of the study on the shipped dog, in a third of its steps -> its model."""
    study = read_sweep(STUDY)
    words = [f"name={variant}", f"data.params.subject_root={ROOT / study.subjects['dog']['photos']}"]
    short = [*SHORTER, "evaluate_also=null"]
    bases = [str(ROOT / path) for path in study.base]
    run_job(parse(["--base", *bases, *words, *study.variants[variant], *short]))
    return Path("logs", variant, "model.safetensors")


def moved(model: Text2Image, base: Text2Image, *, guidance_scale: float) -> float:
    """How far the guided prediction for the class is from the base's, relative to it, at high noise."""
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(8, *base.latent_shape(), generator=generator), torch.linspace(600, 990, 8).long()
    guided = []
    for draw in (model, base):
        contexts = draw.text_encoder(draw.text_encoder.tokenize(["", "a photo of a dog"]))
        told = [Conditioning(contexts[[row] * len(x)]) for row in (0, 1)]
        empty, of_class = (draw.unet.predict(x, t, prompt) for prompt in told)
        guided.append(empty + guidance_scale * (of_class - empty))
    return float((guided[0] - guided[1]).norm() / guided[1].norm())


@pytest.mark.skipif(not BASE.exists(), reason="the storybook's base is not in this checkout")
def test_a_held_empty_prompt_moves_less_and_so_does_the_class_under_guidance(workdir: Path):
    files = {"loose": trained("noise"), "held": trained("teacher, held")}
    base = Text2Image.from_file(BASE)
    models = {name: Text2Image.from_file(file) for name, file in files.items()}
    for scale, bound in ((0.0, 0.85), (2.0, 0.85), (4.0, 0.9)):  # at 0 it is that for the empty prompt
        with torch.no_grad():
            distance = {name: moved(model, base, guidance_scale=scale) for name, model in models.items()}
        assert distance["held"] < bound * distance["loose"], (scale, distance)


def test_the_study_has_the_arms_that_its_page_tells_of(workdir: Path):
    (workdir / "configs").symlink_to(ROOT / "configs")
    study = read_sweep(STUDY)
    assert len(study.variants) == 4 and len(study.seeds) == 2
    assert len({subject["class_word"] for subject in study.subjects.values()}) == 6
    job = study.job("teacher, held", "dog", 23, study.variants["teacher, held"])
    scales = {name: params["guidance_scale"] for name, params in job.config.evaluate_also.items()}
    assert sorted(scales.values()) == [1.0, 2.0, 4.0, 4.0]
