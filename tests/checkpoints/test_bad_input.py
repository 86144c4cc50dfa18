"""What people give as a base by mistake: one sentence that names it and the way out."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ldm.checkpoints.load import load_state_dicts, open_model
from ldm.config import instantiate, load_config, to_container
from ldm.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"


def networks(name: str) -> dict[str, nn.Module]:
    with torch.device("meta"):
        return instantiate(to_container(load_config([CONFIGS / f"dreambooth-{name}.yaml"]))["model"]).networks


@pytest.mark.parametrize(
    ("given", "config", "lines"),
    [
        (
            "sd1",
            "sd2",
            [
                "unet: 64 of another shape",
                "text_encoder: 192 missing",
                r"Stable Diffusion 1\.x: use configs/dreambooth-sd1\.yaml",
            ],
        ),
        (
            "sd2",
            "sd1",
            [
                "unet: 64 of another shape",
                "text_encoder: 192 unknown",
                r"Stable Diffusion 2\.x: use configs/dreambooth-sd2\.yaml",
            ],
        ),
    ],
)
def test_the_part_that_does_not_fit_is_named_and_the_config_that_does(given, config, lines):
    parts = {part: network.state_dict() for part, network in networks(given).items()}
    with pytest.raises(UserError) as error:
        load_state_dicts(networks(config), parts, where="sd.safetensors")
    for line in lines:
        assert error.match(line)
    assert "vae" not in str(error.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({CONV_IN: torch.zeros(1, 9, 3, 3)}, "an inpainting model: its UNet takes 9 channels"),
        ({"encoder.down.0.block.0.norm1.weight": torch.zeros(1)}, r"an autoencoder \(VAE\) alone"),
        ({"lora_te_text_model_x.lora_down.weight": torch.zeros(1)}, "looks like a LoRA"),
        ({"emb_params": torch.zeros(1)}, "a textual inversion embedding"),
    ],
)
def test_files_of_another_kind(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "given.safetensors")
    with pytest.raises(UserError, match=rf"{message}.*given\.safetensors"):
        open_model(tmp_path / "given.safetensors")


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def another_pipeline(folder: Path) -> None:
    write(folder / "model_index.json", {"_class_name": "StableDiffusion3Pipeline"})


def one_network(folder: Path) -> None:
    write(folder / "config.json", {"_class_name": "UNet2DConditionModel"})


def half_of_it(folder: Path) -> None:
    write(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    write(folder / "unet" / "config.json", {})


def broken_config(folder: Path) -> None:
    for name in ("unet", "vae", "text_encoder"):
        write(folder / name / "config.json", {})
    (folder / "unet" / "config.json").write_text('{"in_chan')


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (another_pipeline, "the folder of a StableDiffusion3Pipeline"),
        (one_network, r"one network \(UNet2DConditionModel\).*Name the folder that holds unet"),
        (half_of_it, "incomplete: vae, text_encoder with its config.json is missing"),
        (broken_config, "config cannot be read"),
        (lambda folder: None, "a folder, not a model file.*Name a .safetensors"),
    ],
)
def test_folders_that_are_no_model(tmp_path: Path, make: Callable[[Path], None], message: str):
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        open_model(tmp_path)


def test_what_may_not_be_read_is_named(tmp_path, monkeypatch):
    """As the system says it: for root, every file may be read."""
    (tmp_path / "mine.safetensors").write_bytes(bytes(100))

    def refuse(self: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"Permission denied \(.*mine\.safetensors\)"):
        open_model(tmp_path / "mine.safetensors")


@pytest.mark.parametrize(
    ("said", "config", "fits"), [("v", "eps", False), ("eps", "v", False), ("v", "v", True)]
)
def test_a_config_that_reads_predictions_otherwise_is_refused(tmp_path, said, config, fits):
    metadata = {"ldm.config": json.dumps({"parameterization": said})}
    save_file({CONV_IN: torch.zeros(1, 4, 3, 3)}, tmp_path / "sd.safetensors", metadata=metadata)
    model = open_model(tmp_path / "sd.safetensors")
    if fits:
        model.require_prediction(config)
    else:
        with pytest.raises(UserError, match=rf"Set model\.params\.process\.parameterization={said}"):
            model.require_prediction(config)
