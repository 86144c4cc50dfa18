"""Short trainings of tiny networks, each begun as a new process would begin it, and how to stop them."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf

from ldm.config import save_config
from ldm.data.dreambooth import DreamBoothDataModule
from ldm.reports.curves import Curve, read_curves
from ldm.runs import grid, run
from ldm.runs.folder import LOGS, MARKER, folder_to_resume, new_folder
from ldm.schema import FitConfig, RunConfig, TrainerOptions
from ldm.training.latent_diffusion import LatentDiffusion
from tests.factories import build_module, run_config


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


class At(pl.Callback):
    """Does something at the end of one micro-batch (numbered over the run), before it counts as done."""

    def __init__(self, micro_batch: int, act: Callable[[], None]):
        self.micro_batch, self.act = micro_batch, act

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *rest: Any) -> None:
        if rest[-1] == self.micro_batch:
            self.act()


def kill() -> None:
    raise Killed


@dataclass
class Job:
    """A training of 4 steps; `params` are the model's, `steps` ends it, `accumulate` splits each step."""

    config: dict
    weights: dict[str, dict]
    subject: Path
    accumulate: int = 1
    batch_size: int = 2
    steps: int = 4
    identifier: str = "sks"
    data: dict = field(default_factory=dict)  # more params of the data module

    def __call__(
        self,
        folder: Path,
        *,
        callbacks: Sequence[pl.Callback] = (),
        params: dict | None = None,
        **options: Any,
    ) -> LatentDiffusion:
        """Trains on in `folder` -> the module afterwards."""
        folder.mkdir(exist_ok=True)
        torch.manual_seed(7)  # as main.py does: factors of a LoRA begin at random
        params = {"seed": 7, **(params or {})}
        params["trainable"] = {"learning_rate": 1e-3, **params.get("trainable", {})}
        module = build_module(self.config, **params)
        for name, network in module.networks.items():
            network.load_state_dict(self.weights[name])
        module.add_learned_token()
        single = {"subject_root": str(self.subject), "class_word": "disc", "identifier": self.identifier}
        data = DreamBoothDataModule(
            **({} if "concepts" in self.data else single),
            size=16,
            batch_size=self.batch_size,
            num_priors=0,
            seed=7,
            accumulate=self.accumulate,
            validation_batches=1,
            **self.data,
        )
        data.attach(encode=module.encode_images, vae_hash="tiny", latent_factor=module.networks["vae"].factor)
        trainer = {
            "max_steps": self.steps,
            "accelerator": "cpu",
            "accumulate_grad_batches": self.accumulate,
            "log_every_n_steps": 1,
            "val_check_interval": 2 * self.accumulate,
            "enable_progress_bar": False,
        }
        online_eval = options.pop("online_eval", None)
        trainer_options = TrainerOptions(**trainer | options.pop("trainer", {}))
        config = FitConfig(trainer=trainer_options, **{"checkpoint_every": 1, **options})
        run.fit(module, data, config, folder=folder, callbacks=callbacks, online_eval=online_eval)
        return module


@pytest.fixture
def job(tiny_config: dict, tiny_networks: dict, subject_folder: Path) -> Job:
    return Job(tiny_config, {k: n.state_dict() for k, n in tiny_networks.items()}, subject_folder)


def state_of(folder: Path, step: int) -> dict:
    """The checkpoint of a step: weights, averages, optimizer, schedule, loops, callbacks."""
    return torch.load(folder / "checkpoints" / f"step-{step:08d}.ckpt", weights_only=True)


def curves_of(folder: Path) -> dict[str, Curve]:
    """All that a run logged and that no clock decides."""
    clocked = ("train/images_per_second", "train/peak_memory_mib", "epoch")
    return {name: curve for name, curve in read_curves(folder / "tensorboard").items() if name not in clocked}


def differences(one: Any, other: Any, at: str = "") -> list[str]:
    """Where two nested states differ, to the bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) else [at]
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [*dict.fromkeys([*one, *other])]
        return [d for k in keys for d in differences(one.get(k), other.get(k), f"{at}/{k}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [
            d for k, pair in enumerate(zip(one, other, strict=True)) for d in differences(*pair, f"{at}/{k}")
        ]
    return [] if one == other else [f"{at}: {one!r:.60} {other!r:.60}"]


@pytest.fixture
def words(workdir: Path, tiny_config: dict, tiny_model_file: Path, subject_folder: Path) -> list[str]:
    config = run_config(
        tiny_config,
        base=tiny_model_file,
        subject=subject_folder,
        name="one",
        data={"params": {"validation_batches": 1}},
        trainer={"max_steps": 4, "val_check_interval": 2},
        samples={"n": 1},
    )
    OmegaConf.save(OmegaConf.create(config), workdir / "tiny.yaml")
    return ["--base", "tiny.yaml"]


@dataclass
class ScriptedRuns:
    """In place of `run_job`: folders, curves and metrics.json as a run leaves them, without a training.

    metrics: config, share of the steps done -> the metrics then. before_step: name of the run, step -> what
    happens to the process there. steps: (name of the run, step) for each that was made, in order.
    """

    metrics: Callable[[RunConfig, float], Mapping[str, float]]
    before_step: Callable[[str, int], None] = lambda name, step: None
    steps: list[tuple[str, int]] = field(default_factory=list)
    length: int = 4

    def __call__(self, config: RunConfig, resume: str, *, watch: Callable | None = None) -> None:
        found = folder_to_resume(config.container, resume, allow_config_change=False)
        folder = found or new_folder(LOGS / config.name)
        save_config(config.source, folder / "config.yaml")
        (folder / MARKER).touch()
        kept = folder / "checkpoints" / "rows.json"
        kept.parent.mkdir(exist_ok=True)
        rows = json.loads(kept.read_text()) if kept.exists() else []
        for step in range(len(rows) + 1, self.length + 1):
            self.before_step(config.name, step)
            rows.append({"step": step, **self.metrics(config, step / self.length)})
            self.steps.append((config.name, step))
            if watch is not None:
                watch(rows[-1])
            kept.write_text(json.dumps(rows))
        metrics = {**self.metrics(config, 1.0), "measures": rows, "seconds": {"training": 10.0}}
        (folder / "metrics.json").write_text(json.dumps(metrics))
        (folder / MARKER).unlink()


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ScriptedRuns]:
    """Replaces the runs of studies and searches by `ScriptedRuns` of these arguments."""

    def replace_runs(*args: Any, **options: Any) -> ScriptedRuns:
        runs = ScriptedRuns(*args, **options)
        monkeypatch.setattr(grid, "run_job", runs)
        return runs

    return replace_runs
