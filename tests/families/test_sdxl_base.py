"""A base of v-prediction and zero-terminal SNR: what is trained on it, and that all its files say so."""

import json
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ldm.checkpoints.load import open_model, read_checkpoint
from ldm.commands import convert
from ldm.errors import UserError
from ldm.runs.validate import validate
from ldm.schema import RunConfig
from tests.families import tiny_sdxl

EPS = {"params": {"process": {"parameterization": "eps", "zero_terminal_snr": False}}}


@pytest.fixture
def bases(tmp_path: Path, xl_folder: Path) -> dict[str, Path]:
    """A folder of diffusers, and a file that has ComfyUI's marks beside our metadata."""
    folder = shutil.copytree(xl_folder, tmp_path / "folder")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    said = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | said))
    return {
        "folder": folder,
        "file": convert.main(convert.parse([str(folder), str(tmp_path / "xl.safetensors")])),
    }


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_base_of_zero_terminal_snr_is_trained_as_such(kind, bases, subject_folder, workdir):
    def check(**sections: dict) -> None:
        steps = {"max_steps": 1, "val_check_interval": 1}
        config = tiny_sdxl.run_config(bases[kind], subject_folder, name="x", **sections)
        config["trainer"] |= steps
        validate(RunConfig.parse(config))

    with pytest.raises(UserError) as error:
        check(model=EPS)
    process = "model.params.process."
    assert error.value.remedy == f"Set {process}parameterization=v, {process}zero_terminal_snr=true."
    check()


@pytest.mark.parametrize("zero", [True, False])
def test_both_kinds_of_files_are_marked_by_the_config(zero, xl_file, tmp_path):
    """Converted from eps with a config of v-prediction."""
    section = tiny_sdxl.model_section(xl_file)
    section["process"] |= {"parameterization": "v", "zero_terminal_snr": zero}
    OmegaConf.save(OmegaConf.create({"model": {"params": section}}), tmp_path / "v.yaml")
    paths = [tmp_path / "xl.safetensors", tmp_path / "shards.safetensors.index.json"]
    for path in paths:
        convert.main(convert.parse([str(xl_file), str(path), "--config", str(tmp_path / "v.yaml")]))
        tensors, metadata = read_checkpoint(path)
        assert ("v_pred" in tensors, "ztsnr" in tensors) == (True, zero)
        assert metadata["modelspec.prediction_type"] == "v"
        config = open_model(path).config
        assert (config["parameterization"], config["zero_terminal_snr"]) == ("v", zero)
