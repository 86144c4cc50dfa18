"""The base that a run is measured against: the networks that its training begins with."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.checkpoints.load import file_hash
from ldm.commands import evaluate
from ldm.conditioner import clip_skip_of
from ldm.errors import UserError
from ldm.evaluation.storybook import StorybookEvaluation
from ldm.pipeline import Text2Image
from ldm.runs.evaluate_model import base_of, placement
from ldm.runs.options import parse
from ldm.runs.untrained import base_pipeline, load_untrained
from tests.end_to_end.test_sdxl import base, job  # noqa: F401
from tests.factories import DORA, LORA

CPU = {"device": "cpu", "dtype": torch.float32}


def latents(pipeline: Text2Image) -> torch.Tensor:
    samples = pipeline(["a disc", "b"], seeds=[3, 4], steps=2, height=16, width=16)
    return torch.stack([sample.latents for sample in samples])


@pytest.mark.parametrize("more", [[], [LORA], [DORA]], ids=["full", "lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_base_without_an_adapter(words: list[str], tiny_model_file: Path, more, dtype):
    found = base_pipeline(parse([*words, *more]), device="cpu", dtype=dtype)
    assert torch.equal(latents(found), latents(Text2Image.from_file(tiny_model_file, dtype=dtype)))
    assert found.default_size == 16


def test_it_has_the_parts_of_several_files(words: list[str], tiny_model_file: Path, workdir: Path):
    weights = load_file(tiny_model_file)
    prefix = "model.diffusion_model."
    finer = {key: w * 1.5 if key.startswith(f"{prefix}out.") else w for key, w in weights.items()}
    save_file(finer, "finer.safetensors")
    module, base_hash = load_untrained(parse([*words, "base_parts.unet=finer.safetensors"]))
    for name, weight in module.networks["unet"].state_dict().items():
        assert torch.equal(weight, finer[prefix + name])
    of_base, of_unet = file_hash(tiny_model_file), file_hash("finer.safetensors")
    assert of_base != of_unet and base_hash not in (of_base, of_unet)


def test_the_vae_of_sdxl_stays_in_float32_beside_float16(job: list[str]):  # noqa: F811
    networks = base_pipeline(parse(job), device="cpu", dtype=torch.float16)
    dtypes = [next(n.parameters()).dtype for n in (networks.unet, networks.text_encoder, networks.vae)]
    assert dtypes == [torch.float16, torch.float16, torch.float32]


def test_what_is_missing_is_named_with_what_evaluate_takes(words: list[str], workdir: Path):
    config = replace(parse(words), base_checkpoint="gone.safetensors")
    told = "The base of the run.*no base checkpoint.*gone.safetensors.*--base FILE"
    with pytest.raises(UserError, match=told):
        base_of(evaluate.parse([]), config, **CPU)


def test_a_base_of_the_options_is_read_as_the_run_reads_its_own(words: list[str], tiny_model_file: Path):
    """At its size, with its clip skip and its noise schedule, in place of those that the file states."""
    model = ["text_encoder.params.clip_skip=2", "process.linear_end=0.02"]
    config = parse([*words, "data.params.size=24", *(f"model.params.{key}" for key in model)])
    found = base_of(evaluate.parse(["--base", str(tiny_model_file)]), config, **CPU)
    expected = base_pipeline(config, **CPU)
    assert found.default_size == 24 and clip_skip_of(found.text_encoder) == 2
    assert torch.equal(latents(found), latents(expected))
    assert not torch.equal(latents(found), latents(Text2Image.from_file(tiny_model_file)))


def test_a_device_that_is_not_here_is_refused():
    with pytest.raises(UserError, match="The device nowhere cannot be used"):
        placement(evaluate.parse(["--device", "nowhere"]), StorybookEvaluation())
