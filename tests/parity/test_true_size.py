"""Stable Diffusion at its true size, with random weights, against diffusers: minutes, and up to 12 GiB.

pytest -m slow tests/parity/test_true_size.py
"""

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.checkpoints.load import open_model
from ldm.checkpoints.save import save_model
from ldm.commands import convert
from ldm.config import instantiate, load_config, to_container
from ldm.diffusion.schedule import make_alphas_cumprod
from ldm.models.conditioning import Conditioning
from ldm.pipeline import Text2Image
from tests.checkpoints import sd_v1, sd_v2
from tests.parity.test_files import SCHEDULE, relative_error
from tests.parity.test_long_prompts import VOCABULARY, real

pytestmark = [pytest.mark.slow, real]
TOLERANCE = 1e-4  # of the largest output, float32
SIDE, STEPS, PROMPT, NEGATIVE = 256, 10, "a photo of sks dog", "mud"
CONVERTER = os.environ.get("DIFFUSERS_CONVERTER")  # scripts/convert_diffusers_to_original_stable_diffusion.py
FAMILIES = {
    "sd1": {
        "unet": {"attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64},
        "text": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12},
        "heads": {"num_attention_heads": 12, "hidden_act": "quick_gelu"},
        "prediction": "epsilon",
        "pad": "<|endoftext|>",
    },
    "sd2": {
        "unet": {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "sample_size": 96},
        "text": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23},
        "heads": {"num_attention_heads": 16, "hidden_act": "gelu"},
        "prediction": "v_prediction",
        "pad": "!",
    },
}


def pipeline(family: str) -> StableDiffusionPipeline:
    """diffusers' classes with the configs of the released folders and the weights they begin with."""
    torch.manual_seed(0)
    differs = FAMILIES[family]
    unet = UNet2DConditionModel(
        block_out_channels=[320, 640, 1280, 1280],
        use_linear_projection=family == "sd2",
        **differs["unet"],
    )
    vae = AutoencoderKL(
        sample_size=8 * differs["unet"]["sample_size"],
        block_out_channels=[128, 256, 512, 512],
        layers_per_block=2,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    )
    ids = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
    text = CLIPTextModel(CLIPTextConfig(**ids, **differs["text"], **differs["heads"]))
    prediction = {"prediction_type": differs["prediction"], "clip_sample": False, "set_alpha_to_one": False}
    return StableDiffusionPipeline(
        unet=unet.eval(),
        vae=vae.eval(),
        text_encoder=text.eval(),
        tokenizer=CLIPTokenizer.from_pretrained(VOCABULARY, model_max_length=77, pad_token=differs["pad"]),
        scheduler=DDIMScheduler(**SCHEDULE, **prediction, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def start() -> Tensor:
    return torch.randn(1, 4, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def drawn_there(pipe: StableDiffusionPipeline, latents: Tensor | None = None) -> dict[str, Tensor]:
    """What each network gives; the latents of a picture, unless they are given, and its pixels."""
    pipe.set_progress_bar_config(disable=True)
    if latents is None:
        size = {"height": SIDE, "width": SIDE, "output_type": "latent"}
        prompts = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": 7.5}
        latents = pipe(**prompts, **size, latents=start(), num_inference_steps=STEPS).images
    ids = pipe.tokenizer(PROMPT, padding="max_length", return_tensors="pt").input_ids
    context, scale = pipe.text_encoder(ids)[0], pipe.vae.config.scaling_factor
    pixels = pipe.vae.decode(latents / scale).sample
    return {
        "context": context,
        "prediction": pipe.unet(start(), torch.tensor([501]), context).sample,
        "pixels": pixels,
        "mean": pipe.vae.encode(pixels).latent_dist.mean * scale,
        "latents": latents,
    }


@torch.no_grad()
def drawn_here(t2i: Text2Image, latents: Tensor | None = None) -> dict[str, Tensor]:
    """The same of ours."""
    if latents is None:
        settings = {"negative_prompt": NEGATIVE, "steps": STEPS, "height": SIDE, "width": SIDE}
        t2i._noise = lambda shape, seeds, purpose: start()
        latents = t2i([PROMPT], seeds=[3], **settings)[0].latents.unsqueeze(0)
    context, pixels = t2i.text_encoder(t2i.text_encoder.tokenize([PROMPT])), t2i.vae.decode(latents)
    return {
        "context": context,
        "prediction": t2i.unet(start(), torch.tensor([501]), Conditioning(context)),
        "pixels": pixels,
        "mean": t2i.vae.encode(pixels).mean,
        "latents": latents,
    }


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    print(where, {name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) <= TOLERANCE
    gc.collect()


def assert_the_same_weights(a: Path, b: Path) -> None:
    """Every tensor of `a` is in `b`, bit for bit."""
    with safe_open(a, framework="pt") as left, safe_open(b, framework="pt") as right:
        for name in left.keys():  # noqa: SIM118
            assert torch.equal(left.get_tensor(name), right.get_tensor(name)), name


def run_convert(*words: str | Path) -> Path:
    return convert.main(convert.parse([str(word) for word in words]))


def names(file: Path) -> set[str]:
    with safe_open(file, framework="pt") as opened:
        return set(opened.keys())


@pytest.fixture(autouse=True)
def all_cores() -> Iterator[None]:
    """Networks of this size repay more threads than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_folder_to_file_to_folder(family, tmp_path):
    released, file = tmp_path / "diffusers", tmp_path / "sd.safetensors"
    pipe = pipeline(family)
    pipe.save_pretrained(released)
    for name in ("vocab.json", "merges.txt"):
        (released / "tokenizer" / name).write_bytes((VOCABULARY / name).read_bytes())
    there = drawn_there(pipe)
    del pipe
    run_convert(released, file)
    text = {name for name in sd_v1.names() if name.startswith("cond_stage_model.")}
    expected = sd_v1.names() if family == "sd1" else sd_v1.names() - text | set(sd_v2.text_encoder())
    assert names(file) == expected and len(expected) == {"sd1": 1143, "sd2": 1240}[family]
    t2i = Text2Image.from_file(released)
    assert t2i.process.parameterization == {"sd1": "eps", "sd2": "v"}[family]
    assert t2i.default_size == {"sd1": 512, "sd2": 768}[family]
    assert_close(drawn_here(t2i, there["latents"]), there, "our reading of the folder")
    del t2i
    t2i = Text2Image.from_file(file)
    assert t2i.process.parameterization == {"sd1": "eps", "sd2": "v"}[family]
    t2i.text_encoder.tokenizer_name = str(released / "tokenizer")
    assert_close(drawn_here(t2i), there, "our picture from the file")
    del t2i
    pipe = StableDiffusionPipeline.from_single_file(file, config=str(released), local_files_only=True)
    assert_close(drawn_there(pipe), there, "diffusers' picture from our file")
    del pipe
    folder = run_convert(file, tmp_path / "ours", "--tokenizer", released / "tokenizer")
    for name in ("unet", "vae"):
        weights = f"{name}/diffusion_pytorch_model.safetensors"
        assert names(folder / weights) == names(released / weights)
        assert_the_same_weights(folder / weights, released / weights)
    assert_the_same_weights(file, run_convert(folder, tmp_path / "again.safetensors"))
    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert_close(drawn_there(pipe, there["latents"]), there, "diffusers' reading of our folder")
    del pipe
    if CONVERTER:
        theirs = tmp_path / "theirs.safetensors"
        paths = ["--model_path", str(folder), "--checkpoint_path", str(theirs), "--use_safetensors"]
        subprocess.run([sys.executable, CONVERTER, *paths], check=True)
        assert_the_same_weights(theirs, file)
        t2i = Text2Image.from_file(theirs, config=open_model(folder).config)
        t2i.text_encoder.tokenizer_name = str(released / "tokenizer")
        assert_close(drawn_here(t2i, there["latents"]), there, "our reading of their script's file")


LOAD = """
import sys, time, torch
from ldm.pipeline import Text2Image
def memory(kind):
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(kind))
before, start = memory("VmRSS"), time.perf_counter()
draw = Text2Image.from_file(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
seconds = time.perf_counter() - start
parts = (draw.unet, draw.vae, draw.text_encoder)
size = sum(p.nbytes for part in parts for p in part.parameters())
print(seconds, (memory("VmHWM") - before) / size)
"""


def test_loading_is_quick_and_takes_little_more_than_the_model(tmp_path):
    config = to_container(load_config(["configs/dreambooth-sd1.yaml"]))
    networks = instantiate(config["model"]).networks
    parts = {part: network.state_dict() for part, network in networks.items()}
    file = save_model(tmp_path / "sd.safetensors", parts, alphas_cumprod=make_alphas_cumprod())
    del networks, parts
    gc.collect()
    for dtype in ("float32", "float16"):
        words = [sys.executable, "-c", LOAD, str(file), dtype]
        ended = subprocess.run(words, check=True, capture_output=True, text=True)
        seconds, share = map(float, ended.stdout.split())
        print(f"{file.stat().st_size / 1e9:.2f} GB as {dtype}: {seconds:.1f} s, {share:.3f} of the model")
        assert seconds <= 15 and share <= 1.2
