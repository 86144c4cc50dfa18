"""Measures on the way: rows, the best checkpoint, early stop; they change nothing of the training."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from ldm.errors import UserError
from ldm.training import run
from ldm.training.measures import Measures, Measuring, best_of, check_measuring
from tests.training.conftest import At, Killed, curves_of, differences, kill, state_of


class Scripted:
    """Stands in for a `Score`: its figures are given, one of each measure, and it keeps what it measured."""

    def __init__(self, scores: list[float], network: nn.Module | None = None):
        self.draw = SimpleNamespace(first_stage=nn.Linear(1, 1))
        self.evaluation = SimpleNamespace(score=lambda figures: figures["subject_fidelity"])
        self.scores, self.weights = list(scores), []

    def after(self) -> dict:
        return {"subject_fidelity": self.scores.pop(0), "intervals": {}}


def measures(*scores: float, patience: int = 0) -> Measures:
    return Measures(Scripted(list(scores)), Measuring(every_steps=2, early_stop=patience))


@pytest.fixture
def long_job(job):
    return replace(job, steps=8)


def test_the_best_checkpoint_is_kept_and_taken(long_job, tmp_path: Path):
    module = long_job(
        tmp_path / "run", measures=measures(0.1, 0.7, 0.3, 0.2), checkpoint_every=99, checkpoints_kept=1
    )
    rows = run.measured(tmp_path / "run")
    assert [(row["step"], row["score"]) for row in rows] == [(2, 0.1), (4, 0.7), (6, 0.3), (8, 0.2)]
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("*.ckpt"))
    assert kept == ["step-00000004.ckpt", "step-00000008.ckpt"]
    curve = curves_of(tmp_path / "run")["measure/score"]  # Lightning logs under the number of the last step
    assert [(step + 1, pytest.approx(score)) for step, score in curve] == [
        (2, 0.1),
        (4, 0.7),
        (6, 0.3),
        (8, 0.2),
    ]
    last = {name: value.clone() for name, value in module.state_dict().items()}
    run.take_best(module, tmp_path / "run", rows[best_of(rows)]["step"])
    assert differences(module.state_dict(), state_of(tmp_path / "run", 4)["state_dict"]) == []
    assert differences(module.state_dict(), last) != []
    with pytest.raises(UserError, match=r"step-00000006.*export\.weights=last"):
        run.take_best(module, tmp_path / "run", 6)


def test_training_ends_when_the_score_no_longer_grows(long_job, tmp_path: Path):
    long_job(tmp_path / "run", measures=measures(0.5, 0.4, 0.4, 0.9, patience=2))
    assert [row["step"] for row in run.measured(tmp_path / "run")] == [2, 4, 6]
    ended = state_of(tmp_path / "run", 6)
    long_job(tmp_path / "run", measures=measures(patience=2))  # taken up, it is over still
    assert state_of(tmp_path / "run", 6)["global_step"] == ended["global_step"] == 6
    assert not (tmp_path / "run" / "checkpoints" / "step-00000008.ckpt").exists()


def test_measuring_changes_nothing_and_is_taken_up(long_job, tmp_path: Path):
    plain = long_job(tmp_path / "plain", ema_decay=0.9)
    scores = [0.1, 0.2, 0.3, 0.4]
    measured = long_job(tmp_path / "measured", measures=measures(*scores), ema_decay=0.9)
    assert differences(plain.state_dict(), measured.state_dict()) == []
    with pytest.raises(Killed):
        long_job(tmp_path / "again", measures=measures(*scores), callbacks=[At(4, kill)], ema_decay=0.9)
    again = long_job(tmp_path / "again", measures=measures(*scores[2:]), ema_decay=0.9)
    assert differences(plain.state_dict(), again.state_dict()) == []
    assert run.measured(tmp_path / "again") == run.measured(tmp_path / "measured")


@pytest.mark.parametrize(
    "section, trainer, said",
    [
        ({"every_steps": 50}, {"val_check_interval": 40}, "never follows a validation"),
        ({"every_steps": 50}, {}, "never follows a validation"),
        ({"every_steps": 50}, {"val_check_interval": 100, "accumulate_grad_batches": 2}, None),
        ({"every_steps": 0}, {}, None),
    ],
)
def test_measures_that_would_never_be_taken_are_refused(section, trainer, said):
    plain = {"measures": section, "trainer": trainer, "evaluation": {"target": "x"}}
    if said is None:
        check_measuring(plain)
    else:
        with pytest.raises(UserError, match=said):
            check_measuring(plain)
    if section["every_steps"]:
        with pytest.raises(UserError, match="no `evaluation`"):
            check_measuring({**plain, "evaluation": None})
