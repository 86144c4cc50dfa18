"""The studies of all ways to keep the class: every arm is a run that can end well."""

from pathlib import Path

import pytest
import torch

from ldm.config import instantiate
from ldm.runs.options import parse
from ldm.runs.sweep import read_sweep
from ldm.runs.validate import check_prior_target

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
    check_prior_target(module, data)
    assert (module.lora is not None) == path.stem.endswith("lora")
    kept = [data.prior_batch_size > 0, module.objective.l2_sp_weight > 0, module.objective.subject_loss]
    by_timestep = module.lora is not None and module.lora.masks is not None
    assert sum(map(bool, [*kept, by_timestep])) == (variant != "nothing")
