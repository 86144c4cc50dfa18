"""Steps whose log is not written do not log; what is written is the same."""

from pathlib import Path

import pytest
import pytorch_lightning as pl

from ldm.runs.callbacks import ThroughputLogger
from ldm.training import latent_diffusion
from ldm.training.objective import Objective
from tests.short_runs import At, Job, Killed, curves_of, kill


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_curves_are_those_of_logging_at_every_step(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
):
    job.accumulate = accumulate
    job.steps = 6
    logged: list[bool] = []
    is_logged = latent_diffusion.is_logged
    monkeypatch.setattr(
        latent_diffusion, "is_logged", lambda module: logged.append(is_logged(module)) or logged[-1]
    )
    job(tmp_path / "some", trainer={"log_every_n_steps": 3})
    assert logged == [step % 3 == 2 for step in range(6) for _ in range(accumulate)]
    monkeypatch.setattr(latent_diffusion, "is_logged", lambda module: True)
    job(tmp_path / "all", trainer={"log_every_n_steps": 3})
    curves = curves_of(tmp_path / "some")
    assert [step for step, _ in curves["train/loss"]] == [2, 5]
    assert curves == curves_of(tmp_path / "all")


def test_the_gradient_norm_is_that_of_the_step_it_stands_at(job: Job, tmp_path: Path):
    job.steps = 6
    for every in (1, 3):
        job(tmp_path / str(every), trainer={"log_every_n_steps": every}, callbacks=[ThroughputLogger()])
    each, third = (dict(curves_of(tmp_path / str(every))["train/grad_norm"]) for every in (1, 3))
    assert len(set(each.values())) == 6 and third == {step: each[step] for step in (2, 5)}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_curve_shows_the_mean_of_a_steps_micro_batches(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
):
    """Also of a run that was killed in the middle of a step, and whatever steps are logged."""
    job.accumulate = accumulate
    seen: dict[tuple[int, str], list[float]] = {}
    per_batch = Objective.combine

    def recorded(*arguments):
        loss = per_batch(*arguments)
        if module_of_run.training:
            for name, value in loss.logs("train").items():
                seen.setdefault((module_of_run.global_step, name), []).append(float(value.detach()))
        return loss

    class Remember(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            nonlocal module_of_run
            module_of_run = module

    module_of_run: pl.LightningModule | None = None
    monkeypatch.setattr(Objective, "combine", recorded)
    with pytest.raises(Killed):
        job(tmp_path, callbacks=[Remember(), At(2 * accumulate + accumulate // 2, kill)])
    seen = {key: losses for key, losses in seen.items() if key[0] < 2}  # the step that was cut is done again
    job(tmp_path, callbacks=[Remember()])
    curves = curves_of(tmp_path)
    for name in ("train/loss", "train/subject_loss"):
        assert len(curves[name]) == 4
        for step, value in curves[name]:
            assert len(seen[step, name]) == accumulate
            assert value == pytest.approx(sum(seen[step, name]) / accumulate, rel=1e-6)
