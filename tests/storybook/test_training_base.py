"""Training of the storybook's base: the same loss as `LatentDiffusion`, exact resume, weights in shards."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm.errors import UserError
from ldm.runs.job import run_job
from ldm.runs.options import parse
from ldm.schema import TrainerOptions
from ldm.storybook.stream import StorybookBatches, to_float
from ldm.storybook.training.base import StorybookBase
from ldm.training.latent_diffusion import LatentDiffusion
from tests.factories import MIN_SNR, TAUGHT, build_module

ROOT = Path(__file__).resolve().parents[2]
SMALL = """
model.params.unet.params.model_channels=16 model.params.lr_schedule.params.warmup_steps=2
data.params.batch_size=4 data.params.captions_per_image=2 data.params.validation_items=4
trainer.devices=1 trainer.strategy=auto
trainer.enable_progress_bar=false trainer.val_check_interval=2 checkpoint_every=2
""".split()
SCHEDULE = "model.params.lr_schedule={{target: ldm.optim.schedules.{}, params: {{warmup_steps: 2}}}}"


@pytest.fixture
def params(tiny_config: dict) -> dict:
    return tiny_config | {
        "trainable": {"text_encoder": False},
        "seed": 3,
        "objective": {"weighting": MIN_SNR},
    }


def built(kind: type, params: dict) -> LatentDiffusion:
    torch.manual_seed(0)
    module = build_module(params, kind)
    for parameter in module.networks["unet"].parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return module.train()


def test_the_loss_is_that_of_latent_diffusion(params: dict):
    base, plain = built(StorybookBase, params), built(LatentDiffusion, params)
    batch = StorybookBatches(batch_size=6, seed=1, captions_per_image=2)[3]
    latent_stats = plain.encode_images(to_float(batch["image"])).repeat_interleave(2, 0)
    prepared = base.on_before_batch_transfer(base.prepare(batch), 0)
    losses = base.loss_per_item(prepared | {"latent_stats": latent_stats})
    wanted = plain.loss_per_item(plain.on_before_batch_transfer(batch | {"latent_stats": latent_stats}, 0))
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=0)
    other = base.prepare(StorybookBatches(batch_size=6, seed=1, captions_per_image=2)[4])
    changed = base.loss_per_item(other | {"latent_stats": latent_stats})
    assert ((changed - wanted) / wanted).abs().max() > 0.01


@pytest.mark.parametrize("more", [{"trainable": {"text_encoder": True}}, TAUGHT], ids=str)
def test_what_the_short_step_leaves_out_is_refused(params: dict, more: dict):
    with pytest.raises(UserError, match=f"without {next(iter(more))}"):
        build_module(params, StorybookBase, **more).check(TrainerOptions(max_steps=1))


def test_a_run_taken_up_is_the_run_that_never_stopped(workdir: Path):
    words = ["--base", str(ROOT / "configs/storybook/base.yaml"), *SMALL]
    run_job(parse([*words, "name=whole", "trainer.max_steps=4", "data.params.num_workers=2"]))
    run_job(parse([*words, "name=part", "trainer.max_steps=2", SCHEDULE.format("Constant")]))
    more = ["trainer.max_steps=4", SCHEDULE.format("Cosine")]
    run_job(parse([*words, "name=part", *more]), "logs/part", allow_config_change=True)
    whole, part = (load_file(f"logs/{name}/model.safetensors") for name in ("whole", "part"))
    assert whole.keys() == part.keys()
    unequal = [name for name in whole if not torch.equal(whole[name], part[name])]
    assert unequal == []


def test_it_is_taken_up_from_the_weights_alone(workdir: Path):
    words = ["--base", str(ROOT / "configs/storybook/base.yaml"), *SMALL, "trainer.max_steps=2"]
    (first,) = run_job(parse([*words, "name=first"]))
    words += [f"base_parts.unet={first}", "model.params.trainable.learning_rate=0.0", "export.dtype=fp16"]
    (again,) = run_job(parse([*words, "name=again"]))
    whole, part = load_file(first), load_file(again)
    assert [name for name in whole if not torch.equal(whole[name], part[name])] == []
