"""Text2Image as one writes it in a notebook."""

import os
from pathlib import Path

import pytest
from torch import nn

from ldm.checkpoints.find_model import find_model
from ldm.diffusion.process import DiscreteDiffusion
from ldm.diffusion.schedule import make_alphas_cumprod
from ldm.errors import UserError
from ldm.pipeline import Text2Image

SHORT = {"steps": 1, "guidance_scale": 1.0}


@pytest.fixture
def pipeline(tiny_networks: dict[str, nn.Module]) -> Text2Image:
    return Text2Image(**tiny_networks, process=DiscreteDiffusion(make_alphas_cumprod()), default_size=16)


@pytest.mark.parametrize(
    "prompts, seeds, expected",
    [
        ("a dog", None, [("a dog", 0)]),
        ("a dog", [1], [("a dog", 1)]),
        ("a dog", [4, 2], [("a dog", 4), ("a dog", 2)]),
        ("", None, [("", 0)]),
        (["a dog", "a cat"], None, [("a dog", 0), ("a cat", 1)]),
        (("a dog",), (7,), [("a dog", 7)]),
    ],
)
def test_a_string_is_one_prompt_and_seeds_count_from_0(pipeline, prompts, seeds, expected):
    found = pipeline(prompts, seeds=seeds, **SHORT)
    assert [(sample.prompt, sample.seed) for sample in found] == expected
    if seeds is None:
        assert [(s.prompt, s.seed) for s in pipeline(prompts, **SHORT)] == expected


def test_lists_that_do_not_go_together_are_still_refused(pipeline):
    with pytest.raises(ValueError, match="2 prompts do not go with 1 seeds"):
        pipeline(["a dog", "a cat"], seeds=[1], **SHORT)


def test_the_newest_run_is_found_at_either_depth_and_a_studys_runs_are_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no finished run under logs/"):
        find_model()
    not_runs = ("rex-diffusers/text_encoder", ".rex-diffusers.tmp")  # as convert.py writes them
    for age, name in enumerate((*not_runs, "study-rates/low--dog--23", "pets/rex", "rex")):
        model = Path("logs", name, "model.safetensors")
        model.parent.mkdir(parents=True)
        model.touch()
        os.utime(model, (1e9 - age, 1e9 - age))
        if name not in not_runs:
            (model.parent / "config.yaml").touch()
    assert find_model() == Path("logs/pets/rex/model.safetensors")


def test_a_runs_folder_is_a_model(tiny_model_file: Path, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("name: run\n")
    with pytest.raises(UserError, match=r"The run has no model yet.*--resume"):
        Text2Image.from_file(tmp_path / "run")
    tiny_model_file.rename(tmp_path / "run/model.safetensors")
    for path in (tmp_path / "run", str(tmp_path / "run"), tmp_path / "run/model.safetensors"):
        assert Text2Image.from_file(path).default_size > 0
        assert find_model(Path(path)) == tmp_path / "run/model.safetensors"


def test_a_name_that_is_no_model_is_said_with_what_it_may_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("logs/rex", "rex", "logs/max"):
        Path(folder).mkdir(parents=True)
    for run in ("rex", "max"):  # one of them has a photo folder of its name
        Path("logs", run, "config.yaml").touch()
        with pytest.raises(UserError, match=f"no model, but a run's name.*Name its folder, logs/{run}"):
            find_model(Path(run))
    for name in ("logs/nosuch", "a" * 5000, "a\0b"):
        with pytest.raises(UserError, match="no such model file"):
            find_model(Path(name))
