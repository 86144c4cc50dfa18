"""Stable Diffusion XL against diffusers and transformers at reduced width: networks and files."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from diffusers.models.autoencoders import vae as autoencoder_of_diffusers
from diffusers.pipelines.stable_diffusion_xl import (
    pipeline_stable_diffusion_xl_img2img as img2img_of_diffusers,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.checkpoints.load import open_model
from ldm.checkpoints.lora import read_lora, save_lora
from ldm.commands import convert
from ldm.conditioner import Conditioner
from ldm.errors import UserError
from ldm.families.sdxl.conditioning import Sizes, size_vector
from ldm.models.conditioning import Conditioning
from ldm.models.lora import LoRA
from ldm.pipeline import Text2Image
from tests.families import tiny_sdxl
from tests.families.tiny_sdxl import networks, relative_error

TOLERANCE = 1e-5  # of the largest output, float32
PROMPTS = ["a dog", "a red dog on it"]
SIZES = torch.tensor([[1003.0, 3003, 5, 9, 1024, 768], [512, 640, 0, 0, 512, 640]])


@pytest.fixture(scope="module")
def pipe(tiny_tokenizer: Path) -> StableDiffusionXLPipeline:
    return tiny_sdxl.pipeline(tiny_tokenizer)


@pytest.fixture(scope="module")
def folder(pipe, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl.saved(pipe, tmp_path_factory.mktemp("sdxl") / "diffusers", tiny_tokenizer)


@pytest.fixture(scope="module")
def ours(folder: Path) -> dict[str, nn.Module]:
    return networks(folder)


def theirs(pipe: StableDiffusionXLPipeline, prompts: list[str]) -> tuple[Tensor, Tensor]:
    context, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, device="cpu")
    return context, pooled


def run_convert(*words: str | Path) -> Path:
    return convert.main(convert.parse([str(word) for word in words]))


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@torch.no_grad()
def test_contexts_and_pooled_vectors_equal_diffusers(pipe, ours):
    encoders = ours["text_encoder"]
    context, pooled = encoders(encoders.tokenize(PROMPTS))
    expected = theirs(pipe, PROMPTS)
    assert context.shape == (2, 16, 24 + 32) and pooled.shape == (2, 20)
    for mine, reference in zip((context, pooled), expected, strict=True):
        assert relative_error(mine, reference) <= TOLERANCE
        assert relative_error(mine.flip(0), reference) > 10 * TOLERANCE


def test_an_exclamation_mark_stays_what_it_is(pipe, ours):
    """The second encoder is padded with the id of "!"; only in diffusers is every "!" then that id."""
    encoders = ours["text_encoder"]
    vocabulary, eos = encoders.clip_g.tokenizer.get_vocab(), encoders.clip_g.eos_token_id
    first, second = encoders.tokenize(["a !"])[0].tolist()
    assert first[1:5] == [vocabulary["a</w>"], vocabulary["!</w>"], eos, eos]
    assert second[1:5] == [vocabulary["a</w>"], vocabulary["!</w>"], eos, 0]
    assert pipe.tokenizer_2("a !").input_ids[2] == 0


@torch.no_grad()
def test_the_unet_equals_diffusers(pipe, ours):
    torch.manual_seed(1)
    x, t = torch.randn(2, 4, 16, 8), torch.tensor([1, 801])
    context, pooled = theirs(pipe, PROMPTS)
    expected = pipe.unet(x, t, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": SIZES}).sample

    def predicted(pooled: Tensor, sizes: Tensor) -> Tensor:
        return ours["unet"](x, t, Conditioning(context, vector=size_vector(pooled, sizes)))

    assert relative_error(predicted(pooled, SIZES), expected) <= TOLERANCE
    for k in range(6):  # every number, and the pooled vector, reach the prediction
        other = SIZES.clone()
        other[0, k] += 64
        assert relative_error(predicted(pooled, other), expected) > 10 * TOLERANCE
    assert relative_error(predicted(pooled.flip(0), SIZES), expected) > 10 * TOLERANCE


def test_folders_and_files_and_back_are_equal_to_the_bit(folder, tmp_path):
    """folder -> .safetensors -> folder -> .ckpt -> .safetensors by the command."""
    chain = [folder, *(tmp_path / name for name in ("a.safetensors", "b", "c.ckpt", "d.safetensors"))]
    for source, target in pairwise(chain):
        assert run_convert(source, target) == target
    first, last = load_file(chain[1]), load_file(chain[4])
    assert_equal(last, first)
    for name in ("unet", "vae"):
        file = f"{name}/diffusion_pytorch_model.safetensors"
        assert_equal(load_file(chain[2] / file), load_file(folder / file))
    for name in ("text_encoder", "text_encoder_2"):
        own, reference = (load_file(place / name / "model.safetensors") for place in (chain[2], folder))
        reference = {
            n if "projection" in n else f"text_model.{n.removeprefix('text_model.')}": t
            for n, t in reference.items()
        }
        assert_equal(own, reference)


@pytest.fixture(scope="module")
def single_file(folder, tmp_path_factory) -> Path:
    return run_convert(folder, tmp_path_factory.mktemp("single") / "xl.safetensors")


def assert_same_weights(pipe: StableDiffusionXLPipeline, reference: StableDiffusionXLPipeline) -> None:
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        own, other = getattr(pipe, name).state_dict(), getattr(reference, name).state_dict()
        assert_equal(own, other)


def test_our_single_file_opens_in_diffusers(pipe, folder, single_file):
    read = StableDiffusionXLPipeline.from_single_file(
        single_file, config=str(folder), local_files_only=True, add_watermarker=False
    )
    assert_same_weights(read, pipe)


def test_our_folder_opens_in_diffusers(pipe, single_file, tmp_path):
    written = run_convert(single_file, tmp_path / "xl")
    read = StableDiffusionXLPipeline.from_pretrained(written, local_files_only=True, add_watermarker=False)
    assert_same_weights(read, pipe)
    for own, reference in zip(theirs(read, PROMPTS), theirs(pipe, PROMPTS), strict=True):
        assert torch.equal(own, reference)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_files_in_half_precision_are_read(single_file, tmp_path, dtype):
    half = run_convert(single_file, tmp_path / "half.safetensors", "--dtype", dtype)
    dtypes = {tensor.dtype for tensor in load_file(half).values()}
    assert dtypes == {torch.float16 if dtype == "fp16" else torch.bfloat16}
    read, exact = networks(half), networks(single_file)
    for name in read:
        for own, reference in zip(read[name].parameters(), exact[name].parameters(), strict=True):
            assert torch.allclose(own, reference, rtol=2**-8, atol=1e-6)


def test_a_file_without_a_vae_is_completed_by_one(folder, single_file, tmp_path):
    tensors = load_file(single_file)
    with safe_open(single_file, "pt") as file:
        metadata = file.metadata()
    bare = tmp_path / "bare.safetensors"
    save_file({n: t for n, t in tensors.items() if not n.startswith("first_stage_model.")}, bare, metadata)
    with pytest.raises(UserError, match="--vae FILE"):
        run_convert(bare, tmp_path / "b.safetensors")
    whole = run_convert(bare, tmp_path / "whole.safetensors", "--vae", folder / "vae")
    assert_equal(load_file(whole), tensors)


PICTURE = {"height": 32, "width": 48}
TOLD = {"original_size": (40, 72), "crops_coords_top_left": (3, 5), "target_size": (56, 24)}


@pytest.mark.parametrize("negative", [None, "", "mud"], ids=["zeros", "empty", "mud"])
@torch.no_grad()
def test_ten_steps_with_guidance_equal_diffusers(pipe, folder, negative, monkeypatch):
    """Euler's steps, at sizes that all differ: no negative prompt is zeros, an empty one is encoded."""
    ours = Text2Image.from_file(folder)
    start = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(ours, "_noise", lambda shape, seeds, purpose: start)
    asked = {"num_inference_steps": 10, "guidance_scale": 4.0, "negative_prompt": negative, **PICTURE, **TOLD}
    reference = pipe("a red dog", latents=start.clone(), output_type="latent", **asked).images
    sizes = Sizes(TOLD["original_size"], TOLD["crops_coords_top_left"], TOLD["target_size"])
    settings = {
        "steps": 10,
        "guidance_scale": 4.0,
        "negative_prompt": negative,
        "sampler": "euler",
        **PICTURE,
    }
    for batched in (True, False):
        sample = ours("a red dog", sizes=sizes, spacing="leading", batched_guidance=batched, **settings)[0]
        assert relative_error(sample.latents[None], reference) <= 1e-4
    usual = ours("a red dog", spacing="leading", **settings)[0]
    assert relative_error(usual.latents[None], reference) > 1e-3


@torch.no_grad()
def test_drawing_over_a_picture_equals_diffusers(pipe, folder, monkeypatch):
    """At a strength of 0.6, Euler's steps; the noise of the encoder and of the start are ours."""
    ours = Text2Image.from_file(folder)
    draws = torch.Generator().manual_seed(4)
    photo = Image.fromarray(torch.randint(256, (32, 48, 3), generator=draws, dtype=torch.uint8).numpy())
    noises = {name: torch.randn(1, 4, 16, 24, generator=draws) for name in ("init", "x_T")}
    monkeypatch.setattr(ours, "_noise", lambda shape, seeds, purpose: noises[purpose])
    monkeypatch.setattr(autoencoder_of_diffusers, "randn_tensor", lambda *_, **__: noises["init"])
    monkeypatch.setattr(img2img_of_diffusers, "randn_tensor", lambda *_, **__: noises["x_T"])
    over = StableDiffusionXLImg2ImgPipeline(**pipe.components, add_watermarker=False)
    over.set_progress_bar_config(disable=True)
    asked = {"strength": 0.6, "guidance_scale": 4.0, "negative_prompt": "mud"}
    pixels = {"image": photo, "output_type": "latent", **TOLD}
    reference = over("a red dog", num_inference_steps=10, **asked, **pixels).images
    how = {"steps": 10, "sampler": "euler", "spacing": "leading", "sizes": Sizes(*TOLD.values()), **PICTURE}
    sample = ours("a red dog", init_image=photo, **asked, **how)[0]
    assert relative_error(sample.latents[None], reference) <= 1e-4
    weaker = ours("a red dog", init_image=photo, **asked | {"strength": 0.5}, **how)[0]
    assert relative_error(weaker.latents[None], reference) > 1e-3


LAYERS = {"unet": ["attention", "feed_forward", "projections"], "text_encoder": ["attention"]}


@pytest.mark.parametrize("style", ["kohya", "peft"])
@torch.no_grad()
def test_our_lora_in_diffusers_changes_what_ours_does(folder, pipe, style, tmp_path):
    """In SGM's names of the UNet's blocks, or in PEFT's; read by us it is the same again."""
    built, files = networks(folder), open_model(folder).state_dicts
    adapted = {name: built[name].requires_grad_(True) for name in LAYERS}
    lora = LoRA(rank=2, alpha=1.0, **LAYERS)
    lora.attach(adapted)
    torch.manual_seed(3)
    for parameter in lora.parameters():
        nn.init.normal_(parameter, std=0.15)
    file = save_lora(tmp_path / "mine.safetensors", lora.weights(), files, style=style, dtype=None)
    reference = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    reference.load_lora_weights(file.parent, weight_name=file.name)

    x, t = torch.randn(2, 4, 16, 8), torch.tensor([1, 801])
    context, pooled = theirs(reference, PROMPTS)
    encoding = built["text_encoder"].encode(built["text_encoder"].tokenize(PROMPTS))
    assert relative_error(encoding.context, context) <= TOLERANCE
    assert relative_error(encoding.pooled, pooled) <= TOLERANCE
    told = Conditioning(context, vector=size_vector(pooled, SIZES))
    added = {"text_embeds": pooled, "time_ids": SIZES}
    expected = reference.unet(x, t, context, added_cond_kwargs=added).sample
    assert relative_error(built["unet"](x, t, told), expected) <= TOLERANCE
    assert relative_error(theirs(pipe, PROMPTS)[1], pooled) > 10 * TOLERANCE

    again = read_lora(file, files)
    for network, layers in lora.weights().items():
        assert again[network].keys() == layers.keys()
        for layer, (down, up, alpha) in layers.items():
            own = again[network][layer]
            assert torch.allclose(own[1] @ own[0] * (own[2] / 2), up @ down * (alpha / 2), atol=1e-6)


def test_swapped_text_encoders_and_a_vae_of_another_scale_are_refused(folder, single_file, tmp_path):
    swapped = tmp_path / "swapped"
    shutil.copytree(folder, swapped)
    for old, new in (("text_encoder", "x"), ("text_encoder_2", "text_encoder"), ("x", "text_encoder_2")):
        (swapped / old).rename(swapped / new)
    with pytest.raises(UserError, match="text encoders are swapped"):
        open_model(swapped)
    config = json.loads((folder / "vae" / "config.json").read_text())
    shutil.copytree(folder / "vae", tmp_path / "vae")
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.18215}))
    with pytest.raises(UserError, match=r"by 0.18215, the model's by 0.13025"):
        open_model(single_file, vae=tmp_path / "vae")
    index = json.loads((folder / "model_index.json").read_text())
    (swapped / "model_index.json").write_text(json.dumps(index | {"requires_aesthetics_score": True}))
    with pytest.raises(UserError, match="the refiner of Stable Diffusion XL"):
        open_model(swapped)


@torch.no_grad()
def test_long_prompts_are_read_in_chunks_by_both_encoders(pipe, folder, ours):
    """Each chunk as transformers reads it alone; pooled is the first's; no prompt is as long, and zeros."""
    long, encoders = "a red dog on a mat, " * 2, ours["text_encoder"]
    ids = encoders.tokenize_chunks(long)
    chunks = len(ids)
    assert ids.shape == (chunks, 2, tiny_sdxl.LENGTH) and chunks > 1
    first = pipe.text_encoder(ids[:, 0], output_hidden_states=True)
    second = pipe.text_encoder_2(ids[:, 1], output_hidden_states=True)
    expected = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=2)
    encoding = Conditioner(encoders).encode([long], 2, chunked=True)[long]
    assert relative_error(encoding.context, expected.flatten(0, 1)[None]) <= TOLERANCE
    assert relative_error(encoding.pooled, second.text_embeds[:1]) <= TOLERANCE
    pipeline = Text2Image.from_file(folder)
    drawn = pipeline(long, steps=2, long_prompts=True, guidance_scale=3.0, **PICTURE)
    assert drawn[0].latents.isfinite().all()
    ((prompt, nothing),) = pipeline._encodings([long], (None,), 2, chunked=True)
    assert nothing.context.shape == prompt.context.shape and not nothing.context.any()
