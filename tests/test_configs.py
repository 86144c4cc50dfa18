"""Every shipped YAML fits the constructors that it names, and its model builds (on the meta device)."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Trainer

from ldm.config import check, instantiate, load_config, to_container
from ldm.errors import UserError
from ldm.runs.options import parse
from ldm.training.latent_diffusion import LatentDiffusion

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
MAIN = CONFIGS / "dreambooth.yaml"
BASE = CONFIGS / "storybook/base.yaml"
PRESETS = sorted([*(CONFIGS / "presets").glob("*.yaml"), *(CONFIGS / "studies/common").glob("*.yaml")])
JOBS = sorted(CONFIGS.glob("*.yaml"))
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
    [
        ("sd1", 859_520_964, 123_060_480),
        ("sd2", 865_910_724, 352_984_064),
        ("sdxl", 2_567_463_684, 123_060_480 + 694_659_840),
    ],
)
def test_stable_diffusion_has_its_released_size(name, unet, text_encoder):
    config = to_container(load_config([CONFIGS / f"dreambooth-{name}.yaml"]))
    with torch.device("meta"):
        networks = instantiate(config["model"]).networks
    counts = {part: sum(p.numel() for p in network.parameters()) for part, network in networks.items()}
    assert counts == {"unet": unet, "vae": 83_653_863, "text_encoder": text_encoder}
    assert config["data"]["params"]["size"] == {"sd1": 512, "sd2": 768, "sdxl": 1024}[name]


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_each_value_of_stable_diffusion_is_commented(name):
    lines = [line for path in included(CONFIGS / f"dreambooth-{name}.yaml") for line in lines_of(path)]
    values = [line for line in lines if ": " in line and not line.lstrip().startswith("#")]
    bare = [line for line in values if " # " not in line and not re.search("(target|include): ", line)]
    assert len(values) > 40 and bare == []


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def included(path: Path) -> list[Path]:
    """A file and those that it includes."""
    names = OmegaConf.to_container(OmegaConf.load(path)).get("include", [])
    beside = [path.parent / name for name in ([names] if isinstance(names, str) else names)]
    files = [file if file.exists() else CONFIGS / file.relative_to(path.parent) for file in beside]
    return [path, *(inner for file in files for inner in included(file))]


def test_configs_of_runs_hold_only_what_differs():
    assert {path.name: len(lines_of(path)) for path in JOBS if len(lines_of(path)) > 40} == {}
    parts = {*(CONFIGS / "networks").glob("*.yaml"), *(CONFIGS / "common").glob("*.yaml")}
    assert parts == {file for path in ALONE for file in included(path)} & parts  # none is left over
    for part in parts:
        keys = OmegaConf.to_container(OmegaConf.load(part))
        assert "name" not in keys and "base_checkpoint" not in keys


@pytest.mark.parametrize(
    ("path", "digest"),
    [
        ("dreambooth.yaml", "29e0f432292e628a"),
        ("dreambooth-sd1.yaml", "5f41db5830c64a10"),
        ("dreambooth-sd2.yaml", "0579b3576be84555"),
        ("dreambooth-sdxl.yaml", "e6ad15e904104e12"),
        ("storybook/base.yaml", "1ed61d4b62f44a8e"),
        ("storybook/text_encoder.yaml", "b7b941927622f117"),
    ],
)
def test_a_config_of_parts_says_what_it_said_in_one_piece(path: str, digest: str):
    """Every key and value of the merged config. Who changes one on purpose writes the new digest here."""
    merged = json.dumps(to_container(load_config([CONFIGS / path])), sort_keys=True)
    assert hashlib.sha256(merged.encode()).hexdigest()[:16] == digest, merged


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
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
                parse(["--base", str(MAIN), f"model.params.{moved}={{a: x}}"])
