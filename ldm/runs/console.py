"""What a run says on the console: its phases, bars, its end; lines of libraries are kept out by name."""

import json
import logging
import shlex
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from tqdm import tqdm

from ldm.config import instantiate
from ldm.engine import distributed
from ldm.reports.metric_rows import metric_rows
from ldm.runs.run import PhaseTimer
from ldm.runs.run_facts import program
from ldm.schema import RunConfig

log = logging.getLogger(__name__)

QUIET_LINES = (  # logged by Lightning: adverts, and what our own lines say
    "💡 Tip: For seamless cloud",
    "GPU available: ",
    "TPU available: ",
    "`Trainer.fit` stopped: `max_steps=",
    "`Trainer(val_check_interval=1)` was configured so",
    "LOCAL_RANK: ",
    "Initializing distributed: GLOBAL_RANK: ",
    "You're using the WeightAveraging callback, but saving a checkpoint",
    "Found current_model_state in the checkpoint.",
    "Restoring states from the checkpoint path",
    "Restored all states from the checkpoint",
)
QUIET_WARNINGS = {  # start of the text, a regular expression -> why it is harmless
    r"`isinstance\(treespec, LeafSpec\)` is deprecated": "torch's own tree, as Lightning asks for it",
    r"You have overridden `on_before_batch_transfer` in `LightningModule`": "so it is meant",
    r"You're using the WeightAveraging callback, but loading a checkpoint": "the weights to go on from",
    r"The '\w+_dataloader' does not have many workers": "latents are cached",
    r"Checkpoint directory .* exists and is not empty": "a resumed run",
}
MIRRORED = {"samples_after": "samples_before", "figures_after": "figures_before"}  # they take as long


class _Quiet(logging.Filter):
    """Drops the lines of `QUIET_LINES`, each of which stands for itself and may begin with blank lines."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().lstrip().startswith(QUIET_LINES)


class _Plain(logging.Formatter):
    """A message as it is; a warning or an error says that it is one."""

    def format(self, record: logging.LogRecord) -> str:
        record.message = record.getMessage()  # as every formatter does
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return level + record.message


def speak() -> None:
    """Sets up the root logger's handlers: our lines as they are, those of libraries without `QUIET_LINES`."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(_Quiet())
        handler.setFormatter(_Plain())
    for start in QUIET_WARNINGS:
        warnings.filterwarnings("ignore", message=start)


class Phases(PhaseTimer):
    """A timer that says each phase as it begins, numbered, with the time of those to come as far as known.

    titles: phase -> what is said; other phases are timed in silence.
    """

    def __init__(self, titles: Mapping[str, str]) -> None:
        super().__init__()
        self.titles = titles

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if phase in self.titles and distributed.rank() == 0:
            log.info(self.headline(phase))
        with super().__call__(phase):
            yield

    def headline(self, phase: str) -> str:
        """ "[5/7] Training: 400 steps; after it about 40 s"."""
        order = list(self.titles)
        number = order.index(phase) + 1
        following = [name for name in order[number:] if name in MIRRORED]
        known = sum(self.seconds.get(MIRRORED[name], 0.0) for name in following)
        left = f"; after it about {duration(known)}" if known >= 1 and phase not in MIRRORED.values() else ""
        return f"[{number}/{len(order)}] {self.titles[phase]}{left}"


class TrainingBar(pl.Callback):
    """A bar of optimizer steps, with the losses where they are logged; reading them waits for the device."""

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        start, last = trainer.global_step, trainer.max_steps
        off = not trainer.is_global_zero
        self.bar = tqdm(total=last, initial=start, desc="training", unit="step", disable=off)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: object, batch: dict, batch_idx: int
    ) -> None:
        more = trainer.global_step - self.bar.n
        if more and trainer.global_step % trainer.log_every_n_steps == 0:
            losses = {name.rpartition("/")[2]: value for name, value in trainer.progress_bar_metrics.items()}
            self.bar.set_postfix({name: f"{value:.3f}" for name, value in losses.items()}, refresh=False)
        self.bar.update(more)

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if hasattr(self, "bar"):
            self.bar.close()


def closing(paths: list[Path], config: RunConfig) -> str:
    """The last lines of a run: its metrics, the paths of what it left, the next command."""
    folder = paths[-1].parent
    metrics = folder / "metrics.json"
    lines = metric_lines(json.loads(metrics.read_text(encoding="utf-8"))) if metrics.exists() else []
    lines += [f"{_what(path):9}{path}" for path in paths]
    if config.is_dreambooth:
        prompt = f"{instantiate(config.data).concepts[0].subject_prompt} on the moon"
        command = ["python", "scripts/sample.py"] if program()[0] == "python" else ["dreambooth-sample"]
        lines.append(f"{'next':9}{shlex.join([*command, '--model', str(folder), '--prompt', prompt])}")
    return "\n".join(lines)


def metric_lines(metrics: Mapping[str, Any]) -> list[str]:
    """A line for each metric: its value, and what it is compared with."""
    words = {"base": "base", "ceiling": "photos", "noise_floor": "noise floor"}
    lines = []
    for row in metric_rows(metrics):
        if "base" in row.beside or "noise_floor" in row.beside:
            told = [f"{words[key]} {number:.3f}" for key, number in row.beside.items()]
            lines.append(f"{row.name.replace('_', ' '):24} {row.value:.3f}  ({', '.join(told)})")
    return lines


def _what(path: Path) -> str:
    return {".html": "report", ".png": "samples"}.get(path.suffix, "model")


def duration(seconds: float) -> str:
    """ "40 s", "12 min", "3 h 05 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
