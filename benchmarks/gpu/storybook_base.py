"""Part `storybook_base`: images per second of drawing and of training apart; the base within a time limit.

    python -m benchmarks.gpu.check storybook_base [--seconds 240] [key.sub=value ...]

Without --seconds it only measures. Else it trains for as many steps as fit, with the real command, and leaves
the weights in files of 16 MiB at most in $OUT, which `base_parts.unet` takes up again by their index.
"""

import argparse
import itertools
import os
import time
from typing import Any

import pytorch_lightning as pl
import torch

from benchmarks.gpu.record import CUDA, DEVICE, OUT, ROOT, attempt, memory, new_folder, say
from benchmarks.gpu.runs import run
from benchmarks.timing import timed_by_callback
from ldm.config import instantiate, param_of, with_params
from ldm.engine.device import set_matmul_precision
from ldm.runs.options import parse
from ldm.runs.run import base_files, load_base
from ldm.schema import RunConfig

CONFIGS = [str(ROOT / f"configs/storybook/{name}.yaml") for name in ("base", "base-gpu")]
ON_A_CPU = """
trainer.accelerator=cpu trainer.precision=32-true data.params.batch_size=8 data.params.validation_items=8
""".split()
WARM, STEPS = (10, 50) if CUDA else (1, 2)
ROUNDS = 16  # batches that each process draws while it is timed
START_AND_END = 45  # seconds of a run that are not training: imports, workers, kernels, the export
SPARED = 0.95  # of the steps that fit: validation and checkpoints take some


def storybook_base(*words: str) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--seconds", type=float, help="train the base, all in all within so many seconds")
    options, overrides = parser.parse_known_args(words)
    began = time.perf_counter()
    overrides = [*([] if CUDA else ON_A_CPU), *overrides]
    config = parse(["--base", *CONFIGS, *overrides])
    set_matmul_precision("high")
    cores = len(os.sched_getaffinity(0))
    with attempt("the base"):
        fewer = set() if CUDA else {1, 2}  # a GPU's time is not spent on them
        drawn = max(_draw(config, workers) for workers in sorted({*fewer, cores - 1 or 1}))
        trained = _train(config)
        if options.seconds is not None:
            left = options.seconds - (time.perf_counter() - began) - START_AND_END
            items = SPARED * left * min(drawn, trained)
            _base(overrides, steps=int(items / param_of(config.data, "batch_size")))


def _draw(config: RunConfig, workers: int) -> float:
    """Items per second of batches as the training gets them, ids and noise included, by so many processes."""
    module = instantiate(config.model)
    data = instantiate(with_params(config.data, {"num_workers": workers}))
    data.set_prepare(module.prepare)
    start, used = time.perf_counter(), _cpu_seconds_of_children()
    items = sum(len(batch["item"]) for batch in data.loader(data.train_set, range(ROUNDS * workers)))
    rate = items / (time.perf_counter() - start)
    images = rate / data.train_set.captions_per_image
    cpu = 1000 * (_cpu_seconds_of_children() - used) / items
    say(f"drawing, processes: {workers}", items_per_s=rate, images_per_s=images, cpu_ms_per_item=cpu)
    return rate


def _cpu_seconds_of_children() -> float:
    """Of those that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def _train(config: RunConfig) -> float:
    """Items per second of training alone: the Trainer of the config on a batch that is always there."""
    module = instantiate(config.model)
    load_base(module.networks, base_files(config))
    module.to(DEVICE)
    data = instantiate(with_params(config.data, {"num_workers": 0}))
    data.attach(encode=module.encode_images)
    data.set_prepare(module.prepare)
    batch, seconds = data.train_set[0], []
    if CUDA:
        batch = pinned(batch)

    data.train_dataloader = lambda: itertools.repeat(batch)
    kept = ("accelerator", "devices", "precision", "gradient_clip_val")
    trainer = pl.Trainer(
        **{key: getattr(config.trainer, key) for key in kept},
        max_steps=config.trainer.max_steps,
        callbacks=[timed_by_callback(iter([WARM, STEPS]), seconds.append, device=DEVICE)],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    rate = STEPS * len(batch["item"]) / seconds[1]
    ms = 1000 * seconds[1] / STEPS
    say("training, its images ready", items_per_s=rate, ms=ms, batch=len(batch["item"]), **memory())
    return rate


def pinned(value: Any) -> Any:
    """A batch whose tensors, those of dicts and lists in it too, lie in pinned memory."""
    match value:
        case torch.Tensor():
            return value.pin_memory()
        case dict():
            return {key: pinned(inner) for key, inner in value.items()}
        case list():
            return [pinned(inner) for inner in value]
    return value


def _base(overrides: list[str], *, steps: int) -> None:
    """The base itself: main.py, then its weights in small files."""
    if steps < 1:
        raise RuntimeError("no time is left for a step")
    folder, index = new_folder(), OUT / "base.safetensors.index.json"
    job = ["--base", *CONFIGS, *overrides, "name=base", f"trainer.max_steps={steps}"]
    seconds = run(folder, "main.py", *job)
    run(folder, "scripts/convert.py", str(folder / "logs/base/model.safetensors"), str(index))
    sizes = [path.stat().st_size / 2**20 for path in OUT.glob("base*")]
    say("the base", steps=steps, seconds=seconds, files=len(sizes), largest_mib=max(sizes))
