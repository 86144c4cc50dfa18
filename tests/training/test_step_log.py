"""Steps whose log is not written do not log; what is written is the same."""

from pathlib import Path

import pytest

from ldm.training import latent_diffusion
from tests.training.conftest import Job, curves_of


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
