"""Parts `peer`, `resume`, `syncs` and `whole`: the repository's own commands."""

import collections
import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from safetensors.torch import load_file

from benchmarks.cases import TEXT, model_params
from benchmarks.gpu.record import CUDA, DEVICE, ROOT, SIZE, attempt, chosen, new_folder, say
from benchmarks.ours import build
from benchmarks.timing import synchronize
from ldm.checkpoints.save import save_model

SUBJECT = ROOT / "ldm/storybook/assets/subjects/dog"
SHORT = f"""
data.params.num_priors=4 priors.steps=2 samples.n=1 samples.steps=2 samples.every_steps=0 evaluation=null
online_eval.every_steps=0 trainer.enable_progress_bar=false trainer.val_check_interval=1000
data.params.subject_root={SUBJECT}
""".split()
TEXT_WORDS = [f"model.params.text_encoder.params.{key}={value}" for key, value in TEXT.items()]
STORYBOOK = ["--base", str(ROOT / "configs/dreambooth.yaml"), *SHORT]
WATCHED = range(60, 80) if CUDA else range(2, 4)  # steps whose waits are counted
TIMED = range(20, 60) if CUDA else range(1, 2)


def command(folder: Path, script: str, *words: str) -> subprocess.Popen:
    """A script of this repository in a process, on the device that is checked."""
    place = [] if CUDA or "benchmark" in script or "convert" in script else ["trainer.accelerator=cpu"]
    path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    line = [sys.executable, str(ROOT / script), *words, *place]
    return subprocess.Popen(line, cwd=folder, env=os.environ | {"PYTHONPATH": path})


def run(folder: Path, script: str, *words: str) -> float:
    """Seconds of a command. Raises RuntimeError where it fails."""
    start = time.perf_counter()
    if command(folder, script, *words).wait() != 0:
        raise RuntimeError(f"{script} failed, see the log")
    return time.perf_counter() - start


def job_words(folder: Path) -> list[str]:
    """Of a DreamBooth run of the size that is checked; SD 1.5 gets a file of random weights in `folder`."""
    if SIZE != "sd1":
        return STORYBOOK
    file = folder / "sd.safetensors"
    module = build(model_params(SIZE), device=DEVICE)
    parts = {name: network.state_dict() for name, network in module.networks.items()}
    alphas = module.process.alphas_cumprod.cpu()
    save_model(file, parts, alphas_cumprod=alphas, dtype=torch.float16, metadata={})
    job = ["--base", str(ROOT / "configs/dreambooth-sd1.yaml"), "--data_root", str(SUBJECT)]
    return [*job, "--class_word", "dog", "--actual_resume", str(file), *TEXT_WORDS]


def peer(*words: str) -> None:
    """diffusers' script and its networks at their best beside ours: scripts/benchmark.py."""
    out = new_folder()
    usual = ["full training of UNet and text", "DDIM steps with CFG, batch 1"] if CUDA else []
    only = ["--only", *(words or usual)] if words or usual else []
    how = ["--device", DEVICE, "--out", str(out), *(["--seconds", "0.4"] if CUDA else ["--quick"])]
    with attempt("beside diffusers"):
        seconds = run(out, "scripts/benchmark.py", *how, *only)
        found = json.loads(next(out.glob("*.json")).read_text(encoding="utf-8"))
        for row in found["results"]:
            sides = {f"{side}_ms": row[side]["ms"] for side in ("ours", "script", "best")}
            sides |= {f"{side}_mib": row[side]["peak_mib"] for side in ("ours", "script", "best")}
            ratios = {key: value for key, value in row.items() if "_ratio_" in key}
            say(row["case"], **sides, **ratios, floor_ms=row["floor_ms"])
        say("the comparison", seconds=seconds)


def resume() -> None:
    """main.py on the storybook: never stopped, twice; and stopped in the middle and taken up."""
    folder = new_folder()
    half, whole, every = (3, 6, 3) if not CUDA else (6, 12, 6)
    # A rate that falls to 0 would fall sooner in the run that is to be taken up
    base = [*STORYBOOK, f"checkpoint_every={every}", "model.params.lr_schedule=constant"]
    with attempt("resume"):
        run(folder, "main.py", *base, "name=stopped", f"trainer.max_steps={half}")
        again = ["--resume", "logs/stopped", "--allow_config_change"]
        steps = f"trainer.max_steps={whole}"
        jobs = [command(folder, "main.py", *base, f"name={name}", steps) for name in "ab"]
        jobs.append(command(folder, "main.py", *again, steps))
        if any(job.wait() for job in jobs):
            raise RuntimeError("main.py failed, see the log")
        names = ("a", "b", "stopped")
        files = {name: load_file(folder / "logs" / name / "model.safetensors") for name in names}
        for name, what in (("b", "main.py twice"), ("stopped", "main.py, and stopped and taken up")):
            pairs = [(files["a"][key].float(), files[name][key].float()) for key in files["a"]]
            equal = all(torch.equal(x, y) for x, y in pairs)
            say(what, equal=equal, largest=max(float((x - y).abs().max()) for x, y in pairs))


class _Watch(pl.Callback):
    """Times some steps of a run, and counts what waits for the GPU in some others."""

    def __init__(self, name: str):
        self.name = name
        self.sites: collections.Counter[str] = collections.Counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: dict, batch_idx: int
    ) -> None:
        if batch_idx == TIMED.start:
            synchronize(DEVICE)
            self.since = time.perf_counter()
        if batch_idx == TIMED.stop:
            synchronize(DEVICE)
            ms = 1000 * (time.perf_counter() - self.since) / len(TIMED)
            say(f"a step of main.py on the storybook, {self.name}", ms=ms, batch=len(batch["item"]))
        if batch_idx in (WATCHED.start, WATCHED.stop) and CUDA:
            warnings.simplefilter("always")
            warnings.showwarning = self._hear
            torch.cuda.set_sync_debug_mode("warn" if batch_idx == WATCHED.start else "default")

    def _hear(self, message: Warning | str, *rest: object) -> None:
        """In the place of `warnings.showwarning`."""
        if "synchroniz" not in str(message):
            return
        stack = [f for f in traceback.extract_stack() if "/ldm/" in f.filename or "lightning" in f.filename]
        self.sites[" < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(stack[-3:]))] += 1


def syncs(*words: str) -> None:
    """Where a step of the whole program waits for the device, and how long the storybook's steps take."""
    import ldm.runs.options  # noqa: F401  (it takes the Trainer's signature, and must find its own)
    from ldm.commands import dreambooth  # the command itself, whose Trainer gets a callback more

    original = pl.Trainer
    os.chdir(new_folder())
    place = [] if CUDA else ["trainer.accelerator=cpu"]
    steps = f"trainer.max_steps={WATCHED.stop + 10 if CUDA else WATCHED.stop}"
    for name, more in (("without EMA", ["ema_decay=null"]), ("with EMA", [])):
        if not chosen(name, words):
            continue
        watch = _Watch(name)

        class Watched(original):
            def __init__(self, *args: object, callbacks: list, watch: _Watch = watch, **options: object):
                super().__init__(*args, callbacks=[*callbacks, watch], **options)

        with attempt(name):
            pl.Trainer = Watched
            try:
                run_name = f"name={name.replace(' ', '-')}"
                if dreambooth.main([*STORYBOOK, *more, *place, run_name, steps]) != 0:
                    raise RuntimeError("main.py failed, see the log")
            finally:
                pl.Trainer = original
            figures = {"steps": len(WATCHED), "total": sum(watch.sites.values())} if CUDA else {}
            say(f"waits for the device, {name}", **figures, sites=dict(watch.sites.most_common(12)))


def whole(*overrides: str) -> None:
    """main.py on a file of SD 1.5's size (or on the storybook's base): seconds of each phase."""
    folder = new_folder()
    with attempt("main.py as a whole"):
        steps = 60 if CUDA else 4
        words = [*job_words(folder), "name=whole", f"trainer.max_steps={steps}", "data.params.num_priors=4"]
        words += [f"trainer.val_check_interval={steps // 2}", "samples.n=1", *overrides]
        seconds = run(folder, "main.py", *words)
        metrics = json.loads((folder / "logs/whole/metrics.json").read_text(encoding="utf-8"))
        figures = {"steps": steps, "priors": 4, "seconds": seconds, "peak_mib": metrics["peak_memory_mib"]}
        say("main.py as a whole", **figures, **{f"{k}_s": v for k, v in metrics["seconds"].items()})
