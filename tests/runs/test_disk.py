"""The room that a run asks for its checkpoints is what they take at most."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from ldm import files
from ldm.engine.checkpoints import AtomicCheckpointIO
from ldm.engine.resume import name_of
from ldm.errors import UserError
from ldm.optim.sizes import checkpoint_bytes
from ldm.runs.disk import checkpoints_to_come, require_checkpoint_space
from ldm.training.latent_diffusion import LatentDiffusion
from tests.factories import build_module
from tests.short_runs import Job


@dataclass
class Plan:
    """What a fit is told of its checkpoints."""

    max_steps: int
    checkpoint_every: int
    checkpoints_kept: int
    ema_decay: float | None = None

    @property
    def trainer(self) -> SimpleNamespace:
        return SimpleNamespace(max_steps=self.max_steps)


@pytest.mark.parametrize(
    "plan, how, count",
    [
        (Plan(1600, 400, 1), {}, 3),  # the newest, the best, the one being written
        (Plan(800, 400, 1), {}, 2),  # all that it writes
        (Plan(90, 400, 2), {}, 1),
        (Plan(90, 80, 2), {}, 2),
        (Plan(90, 400, 2), {"evaluate_every": 30}, 4),  # any of three may be the best
        (Plan(1600, 400, 1), {"step": 800, "there": 1}, 2),
        (Plan(1600, 400, 1), {"step": 1200, "there": 2}, 1),
        (Plan(1600, 400, 1), {"step": 800, "there": 9}, 1),  # of a run that kept more
        (Plan(1600, 400, 1), {"step": 1600, "there": 2}, 0),
    ],
)
def test_checkpoints_to_come(plan: Plan, how: dict, count: int):
    assert checkpoints_to_come(plan, **({"evaluate_every": 0} | how)) == count


def test_no_more_are_on_disk_than_was_asked_for(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The best of these validation losses is the first, so that it stays beside the newest."""
    asked, seen, save = [], [], AtomicCheckpointIO.save_checkpoint

    def watched(self: AtomicCheckpointIO, checkpoint: dict, path: Path, storage_options: object = None):
        save(self, checkpoint, path, storage_options)
        seen.append(len(list(Path(path).parent.glob("*.ckpt"))))

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", watched)
    monkeypatch.setattr("ldm.runs.disk.require_space", lambda run, needed, what: asked.append(needed))
    monkeypatch.setattr(
        LatentDiffusion,
        "validation_step",
        lambda self, batch, k: self.log("val/loss", 1.0 * self.global_step),
    )
    module = job(tmp_path, checkpoints_kept=1, checkpoint_every=1, trainer={"val_check_interval": 1})
    assert max(seen) == 3 and asked == [3 * checkpoint_bytes(module, averaged=False)]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that are free, in a list to be changed."""
    bytes_free = [0]
    monkeypatch.setattr(files.shutil, "disk_usage", lambda place: SimpleNamespace(free=bytes_free[0]))
    return bytes_free


def test_a_run_that_goes_on_needs_no_room_for_what_is_there(tiny_config: dict, tmp_path: Path, free: list):
    module, plan = build_module(tiny_config), Plan(max_steps=4, checkpoint_every=1, checkpoints_kept=1)
    one = checkpoint_bytes(module, averaged=False)
    how = {"run": tmp_path, "evaluate_every": 0}
    free[0] = 3 * one - 1
    with pytest.raises(UserError, match="a run's checkpoints would take"):
        require_checkpoint_space(plan, module, **how)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / name_of(1)).touch()
    require_checkpoint_space(plan, module, **how)
    free[0] = one
    with pytest.raises(UserError, match="a run's checkpoints would take"):
        require_checkpoint_space(plan, module, **how)
    (tmp_path / "checkpoints" / name_of(3)).touch()
    require_checkpoint_space(plan, module, **how)
    free[0] = 0
    (tmp_path / "checkpoints" / name_of(4)).touch()  # all steps are done
    require_checkpoint_space(plan, module, **how)


def test_the_disk_that_is_asked_is_the_one_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """logs may be a link to another disk; the run's folder is not there yet."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "logs").symlink_to(tmp_path / "scratch")
    asked: list[Path] = []

    def usage(place: Path) -> SimpleNamespace:
        asked.append(Path(place).resolve())
        return SimpleNamespace(free=10)

    monkeypatch.setattr(files.shutil, "disk_usage", usage)
    monkeypatch.chdir(tmp_path)
    files.require_space(Path("logs/studies/rex"), 10, what="all")
    assert asked == [tmp_path / "scratch"]
