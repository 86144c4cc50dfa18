"""Every shipped YAML fits the constructors that it names, and its model builds (on the meta device)."""

from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from pytorch_lightning import Trainer

from ldm.config import check, instantiate, load_config, to_plain

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
MAIN = CONFIGS / "dreambooth.yaml"
BASE = CONFIGS / "storybook/base.yaml"
PRESETS = sorted((CONFIGS / "presets").glob("*.yaml"))
ALONE = sorted(set(CONFIGS.rglob("*.yaml")) - set(PRESETS))
MERGES = [[path] for path in ALONE] + [[MAIN, preset] for preset in PRESETS]


def label(paths: list[Path]) -> str:
    return "+".join(str(path.relative_to(CONFIGS)) for path in paths)


def sections(config: DictConfig) -> dict[str, object]:
    """Any section: what main.py allows is its own affair; here `trainer` and all nodes must fit."""
    return {key: Trainer if key == "trainer" else object for key in config}


def test_the_main_job_has_a_config():
    assert MAIN.is_file()


@pytest.mark.parametrize("paths", MERGES, ids=label)
def test_keys_and_types_fit_the_constructors(paths):
    config = load_config(paths)
    check(config, sections(config), required=["model"], paths=paths)


@pytest.mark.parametrize("paths", MERGES, ids=label)
def test_the_model_builds(paths):
    model = to_plain(load_config(paths))["model"]
    with torch.device("meta"):
        network = instantiate(model)
    assert sum(parameter.numel() for parameter in network.parameters()) > 0
    assert all(parameter.is_meta for parameter in network.parameters())


def test_the_job_is_set_up_as_its_base_was_trained():
    """Networks, schedule and what is predicted: a base is of no use to other ones."""
    job, base = (to_plain(load_config([path]))["model"]["params"] for path in (MAIN, BASE))
    keys = {f"{part}_config" for part in ("unet", "first_stage", "cond_stage")}
    keys |= {"parameterization", "linear_start", "linear_end", "timesteps", "beta_schedule"}
    assert {key: job.get(key) for key in keys} == {key: base.get(key) for key in keys}
