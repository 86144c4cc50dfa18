"""Measures on the way: rows, the best checkpoint, early stop; they change nothing of the training."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.runs import run
from ldm.runs.online_eval import OnlineEvalCallback, best_of, check_online_eval
from ldm.schema import ExportConfig, OnlineEvalConfig, TrainerOptions
from tests.short_runs import At, Killed, curves_of, differences, kill, state_of


class Scripted:
    """A `BeforeAfterEvaluation` whose metrics are given: one subject fidelity for each evaluation."""

    def __init__(self, scores: list[float], network: nn.Module | None = None):
        self.pipeline = SimpleNamespace(vae=nn.Linear(1, 1))
        self.evaluation = SimpleNamespace(score=lambda metrics: metrics["subject_fidelity"])
        self.scores, self.weights = list(scores), []

    def after(self) -> dict:
        return {"subject_fidelity": self.scores.pop(0), "intervals": {}}


def online_eval(*scores: float, patience: int = 0) -> OnlineEvalCallback:
    return OnlineEvalCallback(Scripted(list(scores)), OnlineEvalConfig(every_steps=2, early_stop=patience))


class OfWeights(OnlineEvalCallback):
    """Its score falls with the weights' distance from where they began: the first is the best."""

    state_key = "OnlineEvalCallback"  # under which a run's history is found

    def __init__(self, begun: dict[str, Tensor], *, killed_at: int = 0):
        super().__init__(Scripted([]), OnlineEvalConfig(every_steps=2, early_stop=2))
        self.before_after.after, self.begun, self.killed_at = self.look, begun, killed_at

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self.trainer, self.unet = trainer, module.networks["unet"]

    def look(self) -> dict:
        if self.trainer.global_step == self.killed_at:
            raise Killed
        apart = [(p - self.begun[name]).square().sum() for name, p in self.unet.named_parameters()]
        return {"subject_fidelity": -float(torch.stack(apart).sum()), "intervals": {}}


@pytest.fixture
def long_job(job):
    return replace(job, steps=8)


def test_the_best_checkpoint_is_kept_and_taken(long_job, tmp_path: Path):
    module = long_job(
        tmp_path / "run", online_eval=online_eval(0.1, 0.7, 0.3, 0.2), checkpoint_every=99, checkpoints_kept=1
    )
    rows = run.load_eval_history(tmp_path / "run")
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
    run.load_best_weights(module, tmp_path / "run", rows[best_of(rows)]["step"])
    assert differences(module.state_dict(), state_of(tmp_path / "run", 4)["state_dict"]) == []
    assert differences(module.state_dict(), last) != []
    with pytest.raises(UserError, match=r"step-00000006.*export\.weights=last"):
        run.load_best_weights(module, tmp_path / "run", 6)


def test_training_ends_when_the_score_no_longer_grows(long_job, tmp_path: Path):
    long_job(tmp_path / "run", online_eval=online_eval(0.5, 0.4, 0.4, 0.9, patience=2))
    assert [row["step"] for row in run.load_eval_history(tmp_path / "run")] == [2, 4, 6]
    ended = state_of(tmp_path / "run", 6)
    long_job(tmp_path / "run", online_eval=online_eval(patience=2))  # taken up, it is over still
    assert state_of(tmp_path / "run", 6)["global_step"] == ended["global_step"] == 6
    assert not (tmp_path / "run" / "checkpoints" / "step-00000008.ckpt").exists()


def test_measuring_changes_nothing_and_is_taken_up(long_job, tmp_path: Path):
    plain = long_job(tmp_path / "plain", ema_decay=0.9)
    scores = [0.1, 0.2, 0.3, 0.4]
    measured = long_job(tmp_path / "measured", online_eval=online_eval(*scores), ema_decay=0.9)
    assert differences(plain.state_dict(), measured.state_dict()) == []
    with pytest.raises(Killed):
        long_job(tmp_path / "again", online_eval=online_eval(*scores), callbacks=[At(4, kill)], ema_decay=0.9)
    again = long_job(tmp_path / "again", online_eval=online_eval(*scores[2:]), ema_decay=0.9)
    assert differences(plain.state_dict(), again.state_dict()) == []
    assert run.load_eval_history(tmp_path / "again") == run.load_eval_history(tmp_path / "measured")


def test_ended_early_it_is_the_run_that_never_stopped_and_exports_the_same(long_job, tmp_path: Path):
    """Killed within evaluations, the last one's included."""
    begun, how = long_job.weights["unet"], {"ema_decay": 0.9, "checkpoint_every": 3, "checkpoints_kept": 1}

    def exported(name: str) -> bytes:
        module = long_job(tmp_path / name, online_eval=OfWeights(begun), **how)
        rows = run.load_eval_history(tmp_path / name)
        run.load_best_weights(module, tmp_path / name, rows[best_of(rows)]["step"])
        path = tmp_path / name / "model.safetensors"
        return module.export(path, dtype=torch.float32, metadata={}).read_bytes()

    whole = exported("whole")
    for step in (4, 6):
        with pytest.raises(Killed):
            long_job(tmp_path / "again", online_eval=OfWeights(begun, killed_at=step), **how)
    assert exported("again") == whole and exported("again") == whole  # it is over, and says the same
    folders = [tmp_path / name for name in ("whole", "again")]
    histories = [run.load_eval_history(folder) for folder in folders]
    assert histories[0] == histories[1] and [row["step"] for row in histories[0]] == [2, 4, 6]
    assert best_of(histories[0]) == 0 and len({row["score"] for row in histories[0]}) == 3
    kept = [sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in folders]
    assert kept[0] == kept[1] and [name for name in kept[0] if name.endswith("ckpt")] == [
        "step-00000002.ckpt",
        "step-00000006.ckpt",
    ]
    assert differences(*[state_of(folder, 6) for folder in folders]) == []
    assert curves_of(folders[0]) == curves_of(folders[1])


@pytest.mark.parametrize(
    "section, trainer, said",
    [
        ({"every_steps": 50}, {"val_check_interval": 40}, "never follows a validation"),
        ({"every_steps": 50}, {}, "never follows a validation"),
        ({"every_steps": 50}, {"val_check_interval": 100, "accumulate_grad_batches": 2}, None),
        ({"every_steps": 50}, {"val_check_interval": 1, "accumulate_grad_batches": 2}, "never follows"),
        ({"every_steps": 12}, {"val_check_interval": 25, "accumulate_grad_batches": 2}, "never follows"),
        ({"every_steps": 25}, {"val_check_interval": 25, "accumulate_grad_batches": 2}, None),
        ({"every_steps": 0}, {}, None),
        ({"every_steps": 250}, {"val_check_interval": 250}, None),  # none here; a longer training has it
        ({"every_steps": 250, "early_stop": 2}, {"val_check_interval": 250}, "after 250 .* has 200"),
    ],
)
def test_measures_that_would_never_be_taken_are_refused(section, trainer, said):
    config = SimpleNamespace(
        online_eval=OnlineEvalConfig(**section),
        trainer=TrainerOptions(max_steps=200, **trainer),
        data={"target": "ldm.data.dreambooth.DreamBoothDataModule"},
        evaluation={"target": "x"},
        export=ExportConfig(),
    )
    if said is None:
        check_online_eval(config)
    else:
        with pytest.raises(UserError, match=said):
            check_online_eval(config)
    if section["every_steps"]:
        config.evaluation = None
        with pytest.raises(UserError, match="needs an `evaluation`"):
            check_online_eval(config)


def test_without_a_validation_there_is_no_evaluation_to_follow_it():
    config = SimpleNamespace(
        online_eval=OnlineEvalConfig(every_steps=50),
        trainer=TrainerOptions(max_steps=200, val_check_interval=50),
        data={
            "target": "ldm.data.dreambooth.DreamBoothDataModule",
            "params": {"validation_batches": 0},
        },
        evaluation={"target": "x"},
        export=ExportConfig(),
    )
    with pytest.raises(UserError, match=r"follows the validation, and there is none.*validation_batches"):
        check_online_eval(config)
    config.online_eval = OnlineEvalConfig(every_steps=0)
    check_online_eval(config)
