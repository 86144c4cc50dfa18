"""Every shipped YAML fits the constructors that it names, and its model builds (on the meta device)."""

import re
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from pytorch_lightning import Trainer

from ldm.config import check, instantiate, load_config, to_container
from ldm.errors import UserError
from ldm.training.latent_diffusion import LatentDiffusion
from ldm.training.options import parse

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
MAIN = CONFIGS / "dreambooth.yaml"
BASE = CONFIGS / "storybook/base.yaml"
PRESETS = sorted([*(CONFIGS / "presets").glob("*.yaml"), *(CONFIGS / "studies/common").glob("*.yaml")])
BASE_PRESETS = [CONFIGS / "storybook/base-gpu.yaml"]
ALONE = sorted({*CONFIGS.glob("*.yaml"), *(CONFIGS / "storybook").glob("*.yaml")} - set(BASE_PRESETS))
MERGES = [[path] for path in ALONE] + [[MAIN, preset] for preset in PRESETS]
MERGES += [[BASE, preset] for preset in BASE_PRESETS]


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
    model = to_container(load_config(paths))["model"]
    with torch.device("meta"):
        network = instantiate(model)
    assert sum(parameter.numel() for parameter in network.parameters()) > 0
    assert all(parameter.is_meta for parameter in network.parameters())


def test_the_job_is_set_up_as_its_base_was_trained():
    """Networks, schedule and what is predicted: a base is of no use to other ones."""
    job, base = (to_container(load_config([path]))["model"]["params"] for path in (MAIN, BASE))
    keys = {"unet", "vae", "text_encoder", "process"}
    assert {key: job.get(key) for key in keys} == {key: base.get(key) for key in keys}


@pytest.mark.parametrize(
    ("name", "unet", "text_encoder"),
    [("sd1", 859_520_964, 123_060_480), ("sd2", 865_910_724, 352_984_064)],
)
def test_stable_diffusion_has_its_released_size(name, unet, text_encoder):
    config = to_container(load_config([CONFIGS / f"dreambooth-{name}.yaml"]))
    with torch.device("meta"):
        networks = instantiate(config["model"]).networks
    counts = {part: sum(p.numel() for p in network.parameters()) for part, network in networks.items()}
    assert counts == {"unet": unet, "vae": 83_653_863, "text_encoder": text_encoder}
    assert config["data"]["params"]["size"] == {"sd1": 512, "sd2": 768}[name]


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_each_value_of_stable_diffusion_is_commented(name):
    lines = (CONFIGS / f"dreambooth-{name}.yaml").read_text(encoding="utf-8").splitlines()
    values = [line for line in lines if ": " in line and not line.startswith("#")]
    assert (
        len(values) > 40
        and [line for line in values if " # " not in line and "target: ldm." not in line] == []
    )


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_the_flags_of_the_command_line_reach_their_keys(name):
    path = str(CONFIGS / f"dreambooth-{name}.yaml")
    flags = ["--actual_resume", "sd.ckpt", "--data_root", "mine", "--class_word", "cat"]
    config = parse(["--base", path, *flags])
    assert config.base_checkpoint == "sd.ckpt"
    params = config.data["params"]
    assert (params["subject_root"], params["class_word"]) == ("mine", "cat")
    with pytest.raises(UserError, match=r"empty \(class_word\)"):
        instantiate(parse(["--base", path]).data).check()


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("model.params.unet_config.params.model_channels=32", "unet"),
        ("model.params.first_stage_config.params.ch=8", "vae"),
        ("model.params.cond_stage_config.params.max_length=32", "text_encoder"),
        ("measures.every_steps=5", "online_eval"),
    ],
)
def test_a_renamed_key_is_refused_with_its_new_name(override, name):
    with pytest.raises(UserError, match=f"Did you mean `{name}`"):
        parse(["--base", str(MAIN), override])


def test_a_key_that_has_moved_is_refused_with_its_new_place():
    """What the message tells to write is accepted, but for the value."""
    for key, moved in LatentDiffusion.MOVED.items():
        with pytest.raises(UserError, match=re.escape(f"`{key}` has moved (model.params.{key}")) as found:
            parse(["--base", str(MAIN), f"model.params.{key}=1"])
        assert f"Write `model.params.{moved}`" in str(found.value)
        if "=" in moved:
            parse(["--base", str(MAIN), f"model.params.{moved}"])
        else:
            with pytest.raises(UserError, match=re.escape(f"(model.params.{moved}")):
                parse(["--base", str(MAIN), f"model.params.{moved}={{a: 1}}"])
