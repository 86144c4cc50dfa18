"""Clipping by the norm that is computed anyway is Lightning's own."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from ldm.training import gradients
from ldm.training.callbacks import Speed
from ldm.training.latent_diffusion import LatentDiffusion
from tests.training.conftest import Job, curves_of


def lightnings(module: LatentDiffusion, *args: object, **options: object) -> None:
    pl.LightningModule.configure_gradient_clipping(module, *args, **options)


@pytest.mark.parametrize("clip", [None, 1e-3, 1e3])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_weights_are_those_of_lightnings_clipping(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: float | None, algorithm: str
):
    trainer = {"gradient_clip_val": clip, "gradient_clip_algorithm": algorithm}
    ours = job(tmp_path / "ours", callbacks=[], trainer=trainer)
    monkeypatch.setattr(LatentDiffusion, "configure_gradient_clipping", lightnings)
    theirs = job(tmp_path / "theirs", callbacks=[], trainer=trainer)
    monkeypatch.undo()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)
    if clip == 1e-3:  # and it does something
        free = job(tmp_path / "free", callbacks=[])
        pairs = zip(ours.parameters(), free.parameters(), strict=True)
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
    job(tmp_path, callbacks=[Speed()], trainer={"gradient_clip_val": 1e-3})
    assert len(norms) == len(set(norms)) == job.steps
    assert [value for _, value in curves_of(tmp_path)["train/grad_norm"]] == pytest.approx(norms)
