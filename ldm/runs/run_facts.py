"""What a run page says of its run at the top: date, command, photos, base, steps, rates."""

import shlex
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from ldm.data.dreambooth import DreamBoothDataModule
from ldm.engine import distributed
from ldm.runs.buckets import bucket_facts, photo_count
from ldm.schema import RunConfig


def run_facts(
    config: RunConfig, data: DreamBoothDataModule, folder: Path, *, base_hash: str
) -> dict[str, str]:
    """Name -> value, of a run that has ended just now."""
    batch = (
        data.batch_size * config.trainer.accumulate_grad_batches * distributed.process_count(config.trainer)
    )
    steps = [int(path.stem.split("-")[1]) for path in folder.glob("checkpoints/step-*.ckpt")]
    asked = config.trainer.max_steps
    done = max(steps, default=asked)
    stopped = "" if done == asked else f" of {asked}, stopped early"
    facts = {
        "Date": f"{datetime.now():%d %B %Y, %H:%M}",
        "Command": command_line(),
        "Subject" if len(data.concepts) == 1 else "Subjects": "; ".join(
            f"{concept.subject_prompt}, {photo_count(len(data.images.photos[concept.name]))}"
            for concept in data.concepts
        ),
        "Buckets": bucket_facts(data),
        "Base": f"{config.base_checkpoint}, sha256 {base_hash[:12]}",
        "Steps": f"{done}{stopped}, each of {photo_count(batch)}",
        "Learning rate": ", ".join(f"{name} {value:g}" for name, value in rates(config.model["params"])),
    }
    return {name: value for name, value in facts.items() if value}


def command_line() -> str:
    """The command of this process as it can be typed again; empty in a notebook."""
    typed = getattr(sys.modules["__main__"], "__file__", None)
    return shlex.join([*program(), *sys.argv[1:]]) if typed else ""


def program() -> list[str]:
    """How this process was called: `python main.py`, or the name of a console command."""
    called = sys.argv[0]
    return ["python", called] if called.endswith(".py") else [Path(called).name]


def rates(params: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, float]]:
    """The learning rates anywhere in the params of a model, by their keys."""
    for key, value in params.items():
        name = f"{within}.{key}" if within else str(key)
        if isinstance(value, Mapping):
            yield from rates(value, name)
        elif "learning_rate" in name and isinstance(value, int | float):
            yield name, value
