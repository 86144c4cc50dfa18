"""Clipping is Lightning's own to one rounding, its norm is computed once, gradients go when they are used."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from ldm.engine import gradients
from ldm.runs import run
from ldm.runs.callbacks import ThroughputLogger
from ldm.schema import FitConfig, TrainerOptions
from ldm.storybook.dataset import StorybookDataModule
from ldm.storybook.training.autoencoder import AutoencoderTask
from ldm.storybook.training.judge import JudgeTask
from ldm.storybook.training.text_encoder import TextEncoderTask
from ldm.training.latent_diffusion import LatentDiffusion
from tests.short_runs import Job, curves_of

ROUNDING = 2e-7  # relative


def lightnings(module: LatentDiffusion, *args: object, **options: object) -> None:
    pl.LightningModule.configure_gradient_clipping(module, *args, **options)


@pytest.mark.parametrize("clip", [None, 1e-3, 1e3])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_weights_are_those_of_lightnings_clipping(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: float | None, algorithm: str
):
    """To the bit; where a norm is clipped, a division stands in for a product: one rounding more."""
    trainer = {"gradient_clip_val": clip, "gradient_clip_algorithm": algorithm}
    clipped = clip == 1e-3
    job.steps = 1 if clipped else 4
    ours = job(tmp_path / "ours", callbacks=[], trainer=trainer)
    monkeypatch.setattr(LatentDiffusion, "configure_gradient_clipping", lightnings)
    theirs = job(tmp_path / "theirs", callbacks=[], trainer=trainer)
    monkeypatch.undo()
    exact = not (clipped and algorithm == "norm")
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        if exact:
            assert torch.equal(one, other)
        else:
            torch.testing.assert_close(one, other, rtol=ROUNDING, atol=ROUNDING * 1e-3)  # of a step of 1e-3
    if clipped:  # and it does something
        free = job(tmp_path / "free", callbacks=[])
        pairs = zip(ours.parameters(), free.parameters(), strict=True)
        assert not all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_bf16", "adamw_bf16_moments"])
def test_the_optimizer_divides_the_gradients(job: Job, tmp_path: Path, optimizer: str):
    """No pass over them in between; the divisor is 1 where the norm is small enough."""
    divisors: list[float] = []

    class Look(pl.Callback):
        def on_before_zero_grad(self, trainer: pl.Trainer, *rest: object) -> None:
            if trainer.global_step:
                divisors.append(float(trainer.optimizers[0].grad_scale))

    def run_with(clip: float) -> list[float]:
        divisors.clear()
        trainer = {"gradient_clip_val": clip}
        job(tmp_path / f"{clip}", callbacks=[Look()], params={"optimizer": optimizer}, trainer=trainer)
        return list(divisors)

    assert all(divisor > 100 for divisor in run_with(1e-4))
    assert set(run_with(1e4)) == {1.0}


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_bfloat16_weights_are_clipped(job: Job, tmp_path: Path, algorithm: str):
    trainer = {"precision": "bf16-true", "gradient_clip_algorithm": algorithm}
    free = job(tmp_path / "free", callbacks=[], trainer=trainer)
    clipped = job(tmp_path / "clipped", callbacks=[], trainer=trainer | {"gradient_clip_val": 1e-6})
    pairs = list(zip(clipped.parameters(), free.parameters(), strict=True))
    assert all(one.isfinite().all() for one, _ in pairs)
    assert not all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_computes_its_norm_once(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
):
    """The guard, the curve and clipping ask for it; each step has its own."""
    norms: list[float] = []

    def counted(tensors: list[torch.Tensor]) -> torch.Tensor:
        norm = torch.nn.utils.get_total_norm(tensors)
        norms.append(norm.item())
        return norm

    monkeypatch.setattr(gradients, "get_total_norm", counted)
    job.accumulate = accumulate
    job(tmp_path, callbacks=[ThroughputLogger()], trainer={"gradient_clip_val": 1e-3})
    assert len(norms) == len(set(norms)) == job.steps
    assert [value for _, value in curves_of(tmp_path)["train/grad_norm"]] == pytest.approx(norms)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_gradient_is_held_through_a_forward_pass(job: Job, tmp_path: Path, accumulate: int):
    """Those that accumulate are; after a step none is left to callbacks, the validation or what follows."""
    held: list[int] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *rest: object) -> None:
            held.append(sum(p.grad is not None for p in module.parameters()))

        def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            assert all(p.grad is None for p in module.parameters())

    job.accumulate = accumulate
    job(tmp_path, callbacks=[Look()])
    assert len(held) == 4 * accumulate
    assert all((count == 0) == ((k + 1) % accumulate == 0) for k, count in enumerate(held))


def tasks() -> dict[str, pl.LightningModule]:
    coder = {"ch": 8, "ch_mult": [1, 2], "num_res_blocks": 1, "num_groups": 4, "scale_factor": 1.0}
    words = {"vocab_size": 651, "bos_token_id": 649, "eos_token_id": 650}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    tokens = {"tokenizer": "ldm/storybook/assets/tokenizer"}
    target = "ldm.models.autoencoder.AutoencoderKL"
    return {
        "autoencoder": AutoencoderTask(vae={"target": target, "params": coder}),
        "text encoder": TextEncoderTask(
            text_encoder={
                "target": "ldm.models.text_encoder.CLIPTextEncoder",
                "params": words | sizes | tokens,
            }
        ),
        "judge": JudgeTask(channels=(8, 8, 8, 8), width=16),
    }


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("name", ["autoencoder", "text encoder", "judge"])
def test_the_storybooks_own_trainings_clip_in_bf16_mixed(tmp_path: Path, name: str, algorithm: str):
    """With the fused optimizer, which Lightning's own clipping refuses there."""
    task = tasks()[name]
    data = StorybookDataModule(batch_size=2, pictures=name != "text encoder", validation_items=2)
    before = [p.detach().clone() for p in task.parameters()]
    trainer = {"max_steps": 2, "accelerator": "cpu", "precision": "bf16-mixed", "enable_progress_bar": False}
    clipping = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": algorithm}
    config = FitConfig(trainer=TrainerOptions(**trainer | clipping))
    run.fit(task, data, config, folder=tmp_path, callbacks=[])
    moved = [not torch.equal(a, b) for a, b in zip(before, task.parameters(), strict=True)]
    assert any(moved) and all(p.isfinite().all() for p in task.parameters())


def test_dreambooth_clips_by_value_in_bf16_mixed(job: Job, tmp_path: Path):
    clipping = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}
    module = job(tmp_path, trainer=clipping | {"precision": "bf16-mixed"})
    assert all(p.isfinite().all() for p in module.parameters())
