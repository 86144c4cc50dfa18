"""What SDXL is refused or warned of, in one sentence and before any work: encoders, families, sizes, VAEs."""

import logging
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from ldm.checkpoints.load import open_model
from ldm.commands import sample
from ldm.diffusion.process import ProcessConfig
from ldm.errors import UserError
from ldm.pipeline import Text2Image
from ldm.runs.job import plan
from ldm.runs.options import parse
from tests.families.test_sdxl_true_size import true_size_networks

VAE = "first_stage_model."


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_a_folder_without_one_of_its_text_encoders(xl_folder: Path, tmp_path: Path, part: str):
    folder = shutil.copytree(xl_folder, tmp_path / "xl")
    shutil.rmtree(folder / part)
    with pytest.raises(UserError, match=f"incomplete: {part} with its config.json"):
        open_model(folder)


def test_a_config_of_stable_diffusion_1_with_a_file_of_xl(words: list[str], xl_file: Path):
    """The other way round is in the end-to-end tests."""
    with pytest.raises(UserError) as error:
        plan(parse([*words, f"base_checkpoint={xl_file}"]))
    said = str(error.value)
    assert "a model of Stable Diffusion XL, but the config is of Stable Diffusion 1.x" in said
    assert "--base configs/dreambooth-sdxl.yaml" in said and not Path("logs").exists()


@pytest.mark.parametrize(("side", "valid"), [(1000, "992 or 1024"), (1040, "1024 or 1056"), (16, "Use 32")])
def test_sides_that_are_no_multiple_of_32(side: int, valid: str):
    pipeline = Text2Image(**true_size_networks(), process=ProcessConfig().build(), default_size=1024)
    assert pipeline.latent_shape() == (4, 128, 128) and pipeline.latent_shape(608, 1376) == (4, 76, 172)
    with pytest.raises(UserError, match=f"height {side} is not a multiple of 32 pixels.*{valid}"):
        pipeline.latent_shape(side, 1024)


def test_samples_below_512_are_warned_of(
    xl_file: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    words = ["--prompt", "a disc", "--n", "1", "--steps", "1", "--model", str(xl_file), "--out", "drawn"]
    monkeypatch.setattr("sys.argv", ["sample.py", *words, "--height", "16", "--width", "520"])
    with caplog.at_level(logging.WARNING):
        sample.main(sample.parse())
    assert "16: SDXL draws badly below 512 pixels" in caplog.text


def test_a_vae_is_told_by_its_scale_or_the_model_around_it(
    xl_file: Path, tiny_model_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Names and shapes of the families' VAEs are the same."""
    whole = load_file(tiny_model_file)
    bare = {name: t for name, t in load_file(xl_file).items() if name.startswith(VAE)}
    save_file(whole, tmp_path / "sd.safetensors")  # without metadata: its UNet is of SD 1.x
    with pytest.raises(UserError, match=r"by 0.18215, the model's by 0.13025"):
        open_model(xl_file, vae=tmp_path / "sd.safetensors")
    save_file(bare, tmp_path / "vae.safetensors")
    with caplog.at_level(logging.WARNING):
        again = open_model(xl_file, vae=tmp_path / "vae.safetensors")
    assert "does not state its scale: it is taken for a VAE of this family, of 0.13025" in caplog.text
    assert again.config["vae"]["params"]["scale_factor"] == 0.13025
    caplog.clear()
    assert open_model(xl_file, vae=xl_file).config["vae"] == again.config["vae"] and not caplog.text
