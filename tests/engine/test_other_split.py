"""A run goes on with its steps split otherwise: into more micro-batches, or into fewer."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import pytorch_lightning as pl

from ldm.data.buckets import Buckets
from tests.short_runs import At, Job, Killed, curves_of, differences, kill, state_of

CHAINS = {  # how a run is split in turn: micro-batches a step, items a micro-batch, the step it ends at
    "into fewer": [(2, 1, 3), (1, 2, 6)],
    "twice into more": [(1, 4, 1), (2, 2, 3), (4, 1, 6)],
    "into numbers that do not divide": [(3, 2, 1), (2, 3, 4), (6, 1, 5)],
}


class Seen(pl.Callback):
    """Step -> its items, and the shapes of its latents, in the order of its micro-batches."""

    def __init__(self) -> None:
        self.items: dict[int, list[int]] = {}
        self.shapes: dict[int, set[tuple[int, ...]]] = {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: dict, batch_idx: int
    ) -> None:
        self.items.setdefault(trainer.global_step, []).extend(batch["item"].tolist())
        self.shapes.setdefault(trainer.global_step, set()).add(tuple(batch["latent_stats"].shape[2:]))


def split(job: Job, accumulate: int, batch_size: int, steps: int) -> Job:
    return replace(job, accumulate=accumulate, batch_size=batch_size, steps=steps)


def same_to_rounding(folder: Path, other: Path) -> bool:
    """Whether two runs logged the same curves at the same steps, to rounding."""
    curves, others = curves_of(folder), curves_of(other)
    assert {name: [step for step, _ in curve] for name, curve in curves.items()} == {
        name: [step for step, _ in curve] for name, curve in others.items()
    }
    for name, curve in curves.items():
        assert [value for _, value in others[name]] == pytest.approx([v for _, v in curve], rel=1e-3), name
    return "train/loss" in curves and "val/loss" in curves


@pytest.mark.parametrize("chain", CHAINS)
def test_a_run_may_be_split_otherwise_from_any_step_on(job: Job, tmp_path: Path, chain: str):
    """Items, losses and validations are those of a run that was split throughout as in its first step."""
    parts, whole, resumed = CHAINS[chain], Seen(), Seen()
    (accumulate, batch_size, _), steps = parts[0], parts[-1][-1]
    once = {"checkpoint_every": steps}
    split(job, accumulate, batch_size, steps)(tmp_path / "whole", callbacks=[whole], **once)
    for part in parts:
        split(job, *part)(tmp_path / "resumed", callbacks=[resumed], **once)
    size = accumulate * batch_size
    assert whole.items == {k: [*range(k * size, (k + 1) * size)] for k in range(steps)}
    assert resumed.items == whole.items
    assert same_to_rounding(tmp_path / "whole", tmp_path / "resumed")
    assert len(curves_of(tmp_path / "whole")["val/loss"]) == steps // 2
    progress = state_of(tmp_path / "resumed", steps)["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    done = dict.fromkeys(("ready", "started", "processed", "completed"), steps * parts[-1][0])
    assert progress == {"total": done, "current": done, "is_last_batch": False}


def test_a_step_has_one_shape_and_is_resumed_to_the_bit_after_another_split(job: Job, tmp_path: Path):
    job = replace(job, data={"buckets": Buckets(unit=4)})
    whole, resumed, again = Seen(), Seen(), Seen()
    split(job, 1, 2, 6)(tmp_path / "whole", callbacks=[whole], checkpoint_every=6)
    split(job, 1, 2, 3)(tmp_path / "resumed", callbacks=[resumed], checkpoint_every=6)
    shutil.copytree(tmp_path / "resumed", tmp_path / "again")
    later = split(job, 2, 1, 6)
    ended = later(tmp_path / "resumed", callbacks=[resumed])
    with pytest.raises(Killed):  # in the middle of the fifth step
        later(tmp_path / "again", callbacks=[At(2 * 4, kill)])
    after = later(tmp_path / "again", callbacks=[again])
    assert resumed.items == whole.items and resumed.shapes == whole.shapes
    assert again.items == {4: whole.items[4], 5: whole.items[5]}
    assert all(len(shapes) == 1 for shapes in resumed.shapes.values())
    assert len(set.union(*resumed.shapes.values())) > 1
    assert same_to_rounding(tmp_path / "whole", tmp_path / "resumed")
    assert curves_of(tmp_path / "again") == curves_of(tmp_path / "resumed")
    assert differences(ended.state_dict(), after.state_dict()) == []
    assert differences(*(state_of(tmp_path / name, 6) for name in ("resumed", "again"))) == []
