"""The studies of all ways to keep the class: every arm is a run that can end well."""

from pathlib import Path

import pytest
import torch

from ldm.config import instantiate
from ldm.runs.objective_check import check_objective
from ldm.runs.options import parse
from ldm.runs.sweep import read_sweep

ROOT = Path(__file__).resolve().parents[2]
STUDIES = [ROOT / f"configs/studies/{name}.yaml" for name in ("ways_to_keep", "ways_to_keep_lora")]
ARMS = [(path, variant) for path in STUDIES for variant in read_sweep(path).variants]


def test_there_are_eight_ways_full_and_with_a_lora():
    assert [sum(path == own for path, _ in ARMS) for own in STUDIES] == [8, 8]


@pytest.mark.parametrize(("path", "variant"), ARMS, ids=[f"{p.stem}: {variant}" for p, variant in ARMS])
def test_each_arm_can_be_trained(path: Path, variant: str):
    study = read_sweep(path)
    subject = ROOT / study.subjects["dog"]["photos"]
    words = [f"data.params.subject_root={subject}", *study.variants[variant]]
    config = parse(["--base", *(str(ROOT / base) for base in study.base), *words])
    data = instantiate(config.data)
    with torch.device("meta"):
        module = instantiate(config.model)
    data.check()
    check_objective(module, data)
    assert (module.lora is not None) == path.stem.endswith("lora")
    kept = [data.prior_batch_size > 0, module.objective.l2_sp_weight > 0, module.objective.subject_loss]
    by_timestep = module.lora is not None and module.lora.masks is not None
    assert sum(map(bool, [*kept, by_timestep])) == (variant != "nothing")


@pytest.mark.parametrize("num_priors", [0, 8])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_prior_images_without_a_weight_are_spoken_of(
    caplog: pytest.LogCaptureFixture, num_priors: int, weight: float
):
    """They are drawn and fill half of each batch, and nothing is learnt from them."""
    words = ["--base", str(ROOT / "configs/dreambooth.yaml"), f"data.params.num_priors={num_priors}"]
    words += ["data.params.prior_caption_dropout=0", f"model.params.objective.prior_loss_weight={weight}"]
    config = parse(words)
    with torch.device("meta"):
        module = instantiate(config.model)
    check_objective(module, instantiate(config.data))
    said = "nothing is learnt from them; data.params.num_priors=0" in caplog.text
    assert said == (num_priors > 0 and weight == 0)
