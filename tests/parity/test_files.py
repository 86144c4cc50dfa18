"""Model files against the projects that define the formats: diffusers' folders and its reader of SD files."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.checkpoints.load import Model, init_on_meta, load_state_dicts, open_model
from ldm.checkpoints.save import save_model
from ldm.checkpoints.save_folder import save_folder
from ldm.commands import convert
from ldm.config import instantiate
from ldm.diffusion.schedule import make_alphas_cumprod
from ldm.errors import UserError
from ldm.models.conditioning import Conditioning
from ldm.pipeline import Text2Image

TOLERANCE = 1e-5  # of the largest output, float32
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FAMILIES = {  # differences of the two, here and there
    "sd1": {
        "unet": {"attention_head_dim": 4, "cross_attention_dim": 32},
        "text": {"hidden_act": "quick_gelu", "num_hidden_layers": 2},
        "prediction": "epsilon",
        "pad": "<|endoftext|>",
    },
    "sd2": {
        "unet": {"attention_head_dim": [2, 4], "cross_attention_dim": 32, "use_linear_projection": True},
        "text": {"hidden_act": "gelu", "num_hidden_layers": 2},
        "prediction": "v_prediction",
        "pad": "!",
    },
}


def filled(network: nn.Module) -> nn.Module:
    """No layer left at zero or one, where it would hide mistakes."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return network.eval()


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pipeline(family: str, tiny_tokenizer: Path) -> StableDiffusionPipeline:
    """diffusers' own classes with random weights: two levels, 32 and 64 channels, latents half as wide."""
    torch.manual_seed(0)
    differs, levels = FAMILIES[family], [32, 64]
    tokenizer = CLIPTokenizer.from_pretrained(tiny_tokenizer, model_max_length=32, pad_token=differs["pad"])
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=levels,
        layers_per_block=1,
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        norm_num_groups=16,
        **differs["unet"],
    )
    vae = AutoencoderKL(
        sample_size=16,
        block_out_channels=levels,
        layers_per_block=1,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=16,
        scaling_factor=0.2,
    )
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **differs["text"],
    )
    return StableDiffusionPipeline(
        unet=filled(unet),
        vae=filled(vae),
        text_encoder=filled(CLIPTextModel(text)),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(
            **SCHEDULE,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=differs["prediction"],
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture
def saved(pipeline: StableDiffusionPipeline, tmp_path: Path, tiny_tokenizer: Path) -> Path:
    """As diffusers saves it, with the vocabulary files that released folders hold."""
    folder = tmp_path / "diffusers"
    pipeline.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).write_bytes((tiny_tokenizer / name).read_bytes())
    return folder


def networks(model: Model) -> dict[str, nn.Module]:
    parts = ("unet", "vae", "text_encoder")
    with init_on_meta():
        built = {part: instantiate(model.config[part]) for part in parts}
    load_state_dicts(built, model.state_dicts)
    return {part: network.eval() for part, network in built.items()}


def relative_error(ours: Tensor, reference: Tensor) -> float:
    return ((ours - reference).abs().max() / reference.abs().max()).item()


@torch.no_grad()
def assert_computes_the_same(ours: dict[str, nn.Module], pipe: StableDiffusionPipeline) -> None:
    torch.manual_seed(1)
    x, context, t = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32), torch.tensor([1, 801])
    told, prediction = Conditioning(context), pipe.unet(x, t, context).sample
    assert relative_error(ours["unet"](x, t, told), prediction) <= TOLERANCE
    assert relative_error(ours["unet"](x, t + 1, told), prediction) > 10 * TOLERANCE
    pixels, scale = torch.rand(2, 3, 16, 16), pipe.vae.config.scaling_factor
    mean = pipe.vae.encode(pixels).latent_dist.mean * scale
    assert relative_error(ours["vae"].encode(pixels).mean, mean) <= TOLERANCE
    assert relative_error(ours["vae"].decode(x), pipe.vae.decode(x / scale).sample) <= TOLERANCE
    prompts = ["a dog", "x" * 50]
    ids = ours["text_encoder"].tokenize(prompts)
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    assert torch.equal(ids, pipe.tokenizer(prompts, **options).input_ids)
    expected = pipe.text_encoder(ids)[0]
    assert relative_error(ours["text_encoder"](ids), expected) <= TOLERANCE


def test_a_folder_saved_by_diffusers_computes_the_same_here(saved, pipeline):
    model = open_model(saved)
    assert model.size("eps") == 16 and model.tokenizer == saved / "tokenizer"
    assert_computes_the_same(networks(model), pipeline)


def picture(pipe: StableDiffusionPipeline, latents: Tensor, **options) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    prompt = {"prompt": "a dog", "negative_prompt": "mud", "num_inference_steps": 5, "guidance_scale": 4.0}
    return pipe(**prompt, latents=latents, output_type="np", **options).images[0]


def drawn_here(model: Path, options: dict) -> tuple[np.ndarray, Tensor]:
    """The picture of `picture` by our own sampling path, and the noise it began with."""
    t2i = Text2Image.from_file(model, **options)
    x_T = t2i._noise(t2i.latent_shape(), [3], "x_T")
    settings = {"negative_prompt": "mud", "steps": 5, "guidance_scale": 4.0}
    return np.asarray(t2i(["a dog"], seeds=[3], **settings)[0].image) / 255, x_T


def test_our_folder_is_a_pipeline_that_draws_our_picture(saved, tmp_path):
    model = open_model(saved)
    ours = save_folder(
        tmp_path / "ours", model.state_dicts, config=model.config, tokenizer=model.tokenizer, size=16
    )
    assert sorted(p.relative_to(ours).as_posix() for p in ours.rglob("*.*")) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        *(["text_encoder/openclip_rest.safetensors"] if model.config["parameterization"] == "v" else []),
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    pipe = StableDiffusionPipeline.from_pretrained(ours, local_files_only=True)
    assert_computes_the_same(networks(model), pipe)
    here, x_T = drawn_here(ours, {})
    there = picture(pipe, x_T, height=16, width=16)
    assert np.abs(here - there).max() <= 1 / 255 + 1e-4  # rounded to levels here
    assert np.abs(picture(pipe, x_T + 0.1, height=16, width=16) - here).max() > 4 / 255
    for name in ("unet", "vae"):  # the same tensors under the same names, shapes and dtypes
        file = f"{name}/diffusion_pytorch_model.safetensors"
        theirs, written = load_file(saved / file), load_file(ours / file)
        assert theirs.keys() == written.keys()
        assert all(torch.equal(theirs[key], written[key]) for key in theirs)


def test_diffusers_own_reader_of_sd_files_accepts_ours(saved, pipeline, tmp_path):
    """Our single file through the converters that `from_single_file` runs, back into diffusers' networks."""
    model = open_model(saved)
    path = save_model(tmp_path / "sd.safetensors", model.state_dicts, alphas_cumprod=make_alphas_cumprod())
    file = load_file(path)
    unet = convert_ldm_unet_checkpoint(dict(file), pipeline.unet.config)
    assert_equal(unet, pipeline.unet.state_dict())
    assert_equal(convert_ldm_vae_checkpoint(dict(file), pipeline.vae.config), pipeline.vae.state_dict())
    text = {name.removeprefix("text_model."): t for name, t in pipeline.text_encoder.state_dict().items()}
    if model.config["parameterization"] == "eps":
        prefix = "cond_stage_model.transformer.text_model."
        theirs = {n.removeprefix(prefix): t for n, t in file.items() if n.startswith(prefix)}
        theirs.pop("embeddings.position_ids")
    else:
        theirs = convert_open_clip_checkpoint(pipeline.text_encoder, dict(file), "cond_stage_model.model.")
        theirs = {n.removeprefix("text_model."): t for n, t in theirs.items()}
        theirs = {n: t for n, t in theirs.items() if n in text}  # but the last layer and the projection
    assert_equal(theirs, text)


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def run_convert(*words: str | Path) -> Path:
    return convert.main(convert.parse([str(word) for word in words]))


def test_files_to_folders_and_back_is_bit_equal(saved, tmp_path):
    """folder -> .safetensors -> folder -> .ckpt -> .safetensors by the command, schedule and all."""
    chain = [saved, *(tmp_path / name for name in ("a.safetensors", "b", "c.ckpt", "d.safetensors"))]
    for source, target in pairwise(chain):
        assert run_convert(source, target) == target
    first, last = load_file(chain[1]), load_file(chain[4])
    assert_equal(last, first)
    assert len([name for name in first if "." not in name]) == 12
    for name in ("unet", "vae"):
        file = f"{name}/diffusion_pytorch_model.safetensors"
        assert_equal(load_file(chain[2] / file), load_file(saved / file))
    assert open_model(chain[4]).config["parameterization"] == open_model(saved).config["parameterization"]
    with pytest.raises(UserError, match="The target exists already"):
        run_convert(chain[4], chain[2])


def test_the_command_casts(saved, tmp_path):
    target = run_convert(saved, tmp_path / "half.safetensors", "--dtype", "fp16")
    dtypes = {tensor.dtype for name, tensor in load_file(target).items() if "." in name}
    assert dtypes <= {torch.float16, torch.int64} and torch.float16 in dtypes


@pytest.mark.parametrize("gone", ["tokenizer", "pad_token"])
def test_a_folder_that_names_no_padding_has_that_of_its_family(saved: Path, family: str, gone: str):
    """SD 2.x was trained with 0, SD 1.x with eos; padding is not masked."""
    for file in (saved / "tokenizer").glob("*.json"):
        if "pad_token" in (content := json.loads(file.read_text())):
            file.write_text(json.dumps({key: value for key, value in content.items() if key != "pad_token"}))
    if gone == "tokenizer":
        shutil.rmtree(saved / "tokenizer")
    params = open_model(saved).config["text_encoder"]["params"]
    assert params["pad_token_id"] == (0 if family == "sd2" else None)
