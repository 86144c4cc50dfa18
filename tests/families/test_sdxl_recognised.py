"""What a file is that looks like Stable Diffusion XL: said by its names and shapes, before it is read."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm.checkpoints.diffusers_config import distilled_scheduler
from ldm.checkpoints.layout import describe, join, split
from ldm.checkpoints.load import open_model
from ldm.diffusion.process import ProcessConfig
from ldm.diffusion.schedule import make_alphas_cumprod
from ldm.errors import UserError
from ldm.families.sdxl.layout import distilled_word
from ldm.families.shapes import CLIP_UNUSED
from tests.families import sdxl_base

UNET = sdxl_base.UNET
EDM = "another noise process"


def shapes() -> dict[str, Tensor]:
    """Every tensor of the released file but the VAE's, of its shape and without memory."""
    own = {UNET + name: shape for name, shape in sdxl_base.unet()} | sdxl_base.text_encoders()
    return {name: torch.empty(shape, device="meta") for name, shape in own.items()}


def refiner() -> dict[str, Tensor]:
    kept = {name: tensor for name, tensor in shapes().items() if sdxl_base.CLIP_L not in name}
    return {name.replace("embedders.1.", "embedders.0."): tensor for name, tensor in kept.items()}


def smaller() -> dict[str, Tensor]:
    return {name: tensor for name, tensor in shapes().items() if "middle_block.1." not in name}


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (refiner(), "the refiner of Stable Diffusion XL"),
        (smaller(), "SSD-1B"),
        (shapes() | {"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}, EDM),
        ({"model.diffusion_model.joint_blocks.0.x": torch.zeros(1)}, "a Stable Diffusion 3 model"),
        (
            {UNET + "label_emb.0.0.weight": torch.zeros(1), "cond_stage_model.model.x": torch.zeros(1)},
            "an unCLIP model",
        ),
    ],
    ids=["refiner", "smaller", "edm", "sd3", "unclip"],
)
def test_relatives_are_named(file, said):
    assert said in describe(file)


def test_the_base_and_its_fine_tunes_are_none_of_them():
    lean = {n: t for n, t in shapes().items() if not n.endswith(("position_ids", "logit_scale"))}
    for file in (shapes(), lean, shapes() | {"denoiser.sigmas": torch.ones(1000), "v_pred": torch.ones(1)}):
        assert describe(file) is None


@pytest.fixture
def small_file(tmp_path: Path):
    """-> a function that writes a .ckpt of SDXL's names with tensors of one number, without some of them."""

    def write(name: str = "xl.ckpt", *, without: tuple[str, ...] = (), **more: Tensor) -> Path:
        kept = [n for n in shapes() if not n.startswith(without or "nothing")]
        torch.save({n: torch.zeros(1) for n in kept} | more, tmp_path / name)
        return tmp_path / name

    return write


@pytest.mark.parametrize(("number", "said"), [(0, r"CLIP-L"), (1, r"OpenCLIP bigG")])
def test_a_text_encoder_that_is_missing_is_named(small_file, number, said):
    with pytest.raises(UserError, match=f"it lacks the .* text encoder .{said}"):
        open_model(small_file(without=(f"conditioner.embedders.{number}.",)))


def test_inpainting_is_named(small_file):
    channels = {UNET + "input_blocks.0.0.weight": torch.zeros(320, 9, 3, 3)}
    with pytest.raises(UserError, match="an inpainting model"):
        open_model(small_file(**channels))


def test_marks_of_v_prediction_are_honoured(small_file):
    model = open_model(small_file(v_pred=torch.ones(1), ztsnr=torch.ones(1)))
    assert model.known["parameterization"] == model.prediction == "v" and model.known["zero_terminal_snr"]
    with pytest.raises(UserError, match="parameterization=v"):
        model.require_prediction("eps")
    assert open_model(small_file("eps.ckpt")).prediction is None
    alone = open_model(small_file("alone.ckpt", ztsnr=torch.ones(1)))  # ComfyUI reads it beside v_pred
    assert alone.prediction is None and "zero_terminal_snr" not in alone.known


def test_marks_are_written_again():
    """By the schedule that a model has, rounded to float32 or not, as by one that another tool's file has."""
    parts = split(shapes())
    schedules = {
        zero: ProcessConfig(parameterization="v", zero_terminal_snr=zero).build() for zero in (True, False)
    }
    for zero, marks in ((True, {"v_pred", "ztsnr"}), (False, {"v_pred"})):
        for alphas_cumprod in (
            schedules[zero].alphas_cumprod,
            make_alphas_cumprod(zero_terminal_snr=zero, dtype=torch.float64),
        ):
            joined = join(parts, alphas_cumprod, v_prediction=True)
            assert joined.keys() & {"v_pred", "ztsnr"} == marks
            assert not join(parts, alphas_cumprod).keys() & {"v_pred", "ztsnr"}
    assert "ztsnr" in join(parts, torch.tensor([0.9, 0.0]), v_prediction=True)


def test_distilled_models_are_warned_of(small_file, caplog):
    """By a word of the name or title, or a folder's scheduler: no tensor tells."""
    with caplog.at_level(logging.WARNING):
        open_model(small_file("sdxl_lightning_4step.ckpt"))
    assert "distilled (lightning)" in caplog.text
    assert distilled_word("stable-diffusion-xl-turbo-v1") == "turbo" and distilled_word("juggernaut") is None
    ancestral = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
    assert distilled_scheduler(ancestral) == "EulerAncestralDiscreteScheduler"
    assert distilled_scheduler({"_class_name": "LCMScheduler"}) == "LCMScheduler"
    released = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
    assert distilled_scheduler(released) is None


def test_the_other_half_of_clip_is_left_out(xl_file):
    """As ComfyUI's savers and merging tools leave it, of either text encoder."""
    tensors = load_file(xl_file)
    first = [f"conditioner.embedders.0.{name}" for name in CLIP_UNUSED]
    second = sdxl_base.CLIP_G + "transformer.text_model.embeddings.position_ids"
    whole, more = split(tensors), split(tensors | dict.fromkeys([*first, second], torch.ones(1, 4)))
    assert all(more[part].keys() == whole[part].keys() for part in whole)


@pytest.mark.parametrize("gone", ["tokenizer*", "tokenizer_2", "pad_token"])
def test_a_folder_that_names_no_padding_has_that_of_the_release(xl_folder, tmp_path, gone):
    """bigG was trained with 0, CLIP-L with eos; padding is not masked."""
    folder = shutil.copytree(xl_folder, tmp_path / "folder")
    for path in [] if gone == "pad_token" else folder.glob(gone):
        shutil.rmtree(path)
    for file in folder.glob("tokenizer*/*.json"):
        if "pad_token" in (content := json.loads(file.read_text())):
            file.write_text(json.dumps({key: value for key, value in content.items() if key != "pad_token"}))
    nodes = open_model(folder).config["text_encoder"]["params"]
    assert [nodes[key]["params"]["pad_token_id"] for key in ("clip_l", "clip_g")] == [None, 0]
