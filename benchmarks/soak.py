"""Kills a job at random moments, resumes it, compares what it leaves: what `scripts/soak.py` does."""

import logging
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

from ldm.config import instantiate, param_of
from ldm.data.images import load_image
from ldm.engine.resume import by_step, validate_checkpoint
from ldm.files import read_section, write_section
from ldm.reports.curves import read_curves
from ldm.runs.generate_set import generate_set
from ldm.runs.job import run_job
from ldm.runs.options import parse

SMALL = [
    "model.params.unet.params.model_channels=16",
    *("data.params.size=32", "data.params.batch_size=1", "data.params.num_priors=24"),
    *("priors.steps=8", "priors.batch_size=2", "base_checkpoint=base.safetensors"),
    *("trainer.max_steps=12", "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=8"),
    *("trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu"),
    *("checkpoint_every=2", "ema_decay=0.9", "evaluation=null", "online_eval.every_steps=0"),
    *("samples.n=1", "samples.steps=2", "samples.every_steps=6"),
]
PATTERNS = ["{priors}/*/.*.tmp", "{latents}/.*.tmp", "logs/{name}*/checkpoints/.*.tmp"]
PATTERNS += ["logs/{name}*/samples/.*.tmp", "logs/{name}*/.model*.tmp", "logs/{name}*/.report.html.*.tmp"]
PATTERNS += ["logs/{name}*/.[!mr]*.tmp"]  # config, metrics
PAUSED, BESIDE = 0.3, 0.5  # shares of the attempts
LONGEST = 600  # seconds that an attempt may take before it counts as hanging
FORK = multiprocessing.get_context("fork")
STEPS = FORK.Value("i", 0)  # optimizer steps of all attempts at one run


def speak_to_log() -> None:
    log = os.open("soak.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)


def attempt(words: list[str]) -> None:
    """`main.py --resume auto`, in a process of its own; what it says goes to soak.log."""
    speak_to_log()

    def count(*_: object) -> None:
        STEPS.value += 1

    register_optimizer_step_post_hook(count)
    try:
        run_job(parse(words), "auto")
    except BaseException:
        traceback.print_exc()
        raise


def prior_images(words: list[str]) -> None:
    """`scripts/generate_priors.py`, the same way."""
    speak_to_log()
    try:
        generate_set(parse(words))
    except BaseException:
        traceback.print_exc()
        raise


def make_base(words: list[str]) -> None:
    """The networks of the config as they are before any training."""
    torch.manual_seed(0)
    module = instantiate(parse(words).model)
    module.export(Path("base.safetensors"), dtype=torch.float32, metadata={})


def forked(work: Callable[[list[str]], None], words: list[str]) -> multiprocessing.Process:
    process = FORK.Process(target=work, args=(words,))
    process.start()
    return process


def finished(process: multiprocessing.Process) -> None:
    process.join(LONGEST)
    if process.exitcode != 0:
        raise SystemExit(f"an attempt ended with {process.exitcode}")


def strike(process: multiprocessing.Process, moments: random.Random, seconds: float, name: str) -> Counter:
    """Kills a process after a random time or, half the time, as a random file is written before then.

    -> "kills": 1, unless it ended by itself; "pauses": 1 if it was stopped and continued before.
    """
    pattern, number = moments.choice([*[None] * len(PATTERNS), *PATTERNS]), moments.randint(1, 4)
    start, wait, seen, done = time.monotonic(), moments.uniform(0, 0.7 * seconds), set(), Counter()
    wait = wait if pattern is None else seconds
    pause = moments.uniform(0, wait) if moments.random() < PAUSED else wait
    while process.is_alive() and len(seen) < number and time.monotonic() - start < wait:
        if pattern is not None:
            seen |= set(Path().glob(pattern.format(name=name, **folders(name))))
        if time.monotonic() - start > pause and not done["pauses"]:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGSTOP)
                time.sleep(moments.uniform(0, 0.5))
                os.kill(process.pid, signal.SIGCONT)
                done["pauses"] += 1
        time.sleep(0.0005)
    process.kill()
    process.join()
    done["kills"] += process.exitcode == -signal.SIGKILL
    return done


def folders(name: str) -> dict[str, str]:
    """The folders that a run shares with others."""
    return {"priors": f"priors-{name}", "latents": f"latents-{name}"}


def phase(name: str, *, priors: int, latents: int, steps: int) -> str:
    """What a killed attempt was at, by what it left and by how many files there are in the end."""
    left = [path.relative_to("logs").parts[1] for path in Path("logs").glob(f"{name}*/**/.*.tmp")]
    if "checkpoints" in left:
        return "writing a checkpoint"
    if any(file.startswith(".report.html") for file in left):
        return "writing the report"
    if left:
        return "writing model, pictures or metrics"
    shared = {what: Path(folder) for what, folder in folders(name).items()}
    if len(list(shared["priors"].glob("*/*.safetensors"))) < priors:
        writing = any(shared["priors"].glob("*/.*.tmp"))
        return "writing a prior image" if writing else "start and prior images"
    if len(list(shared["latents"].glob("*.safetensors"))) < latents:
        return "encoding latents" if shared["latents"].exists() else "samples before training"
    done = list(Path("logs").glob(f"{name}*/checkpoints/step-{steps:08d}.ckpt"))
    return "after training" if done else "training"


def left_by(name: str) -> dict[str, object]:
    """All that a finished run leaves and that no clock decides, by what it is."""
    (model,) = Path("logs").glob(f"{name}*/model.safetensors")
    folder = model.parent
    last = torch.load(by_step(folder / "checkpoints")[0], weights_only=True)
    state = {k: last[k] for k in ("state_dict", "current_model_state", "optimizer_states", "global_step")}
    clocks = ("train/images_per_second", "train/peak_memory_mib")
    curves = {k: v for k, v in read_curves(folder / "tensorboard").items() if k not in clocks}
    pictures = sorted([*folder.glob("samples/*.png"), *folder.glob("samples/before/*.png")])
    shared = {what: Path(path) for what, path in folders(name).items()}
    priors = [path for path in sorted(shared["priors"].glob("*/*")) if not path.name.startswith(".")]
    kept = {
        p.name: load_file(p) for p in [*priors, *shared["latents"].glob("*")] if p.suffix == ".safetensors"
    }
    page = (folder / "report.html").read_text(encoding="utf-8")
    return {
        "model": load_file(model),
        "checkpoint": state,
        "curves": curves,
        "pictures": {str(p.relative_to(folder)): load_image(p).tobytes() for p in pictures},
        "priors": {p.name: p.read_bytes() for p in priors if p.name not in kept},
        "latents": kept,
        "report": [page.endswith("</html>\n"), *re.findall(r'src="data:image/[^"]*"', page)],
        "files": sorted(p.name for p in folder.iterdir()),
    }


def equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def torn(name: str) -> list[Path]:
    """Checkpoints that are not whole, and unfinished files, in the folders of a run."""
    found = [p for p in Path("logs").glob(f"{name}*/checkpoints/*.ckpt") if validate_checkpoint(p)]
    return found + list(Path("logs").glob(f"{name}*/**/*.broken"))


def soak(words: list[str], *, kills: int, moments: random.Random) -> tuple[Counter, Counter]:
    """Runs until they were killed `kills` times -> figures, and kills by phase."""

    def job_of(name: str) -> list[str]:
        shared = folders(name)
        return [
            *(*words, f"name={name}"),
            *(f"priors.folder={shared['priors']}", f"data.params.cache_root={shared['latents']}"),
        ]

    config = parse(job_of("whole"))
    ends = {"priors": param_of(config.data, "num_priors"), "steps": config.trainer.max_steps}
    finished(forked(make_base, words))
    start = time.monotonic()
    finished(forked(attempt, job_of("whole")))
    seconds, whole = time.monotonic() - start, left_by("whole")
    ends["latents"] = len(list(Path(folders("whole")["latents"]).glob("*.safetensors")))
    counts, phases = Counter(), Counter()
    while counts["kills"] < kills:
        counts["runs"] += 1
        name, STEPS.value = f"run{counts['runs']}", 0
        while True:
            before = phase(name, **ends)
            beside = "prior" in before and moments.random() < BESIDE
            other = forked(prior_images, job_of(name)) if beside else None
            process = forked(attempt, job_of(name))
            done = strike(process, moments, seconds, name) if counts["kills"] < kills else Counter()
            counts += done
            if done["kills"]:
                phases[phase(name, **ends)] += 1
                counts["torn files"] += len(torn(name))
            if other is not None and counts["kills"] < kills and moments.random() < 0.5:
                other.kill()
                other.join()
                if other.exitcode == -signal.SIGKILL:
                    counts["kills"] += 1
                    phases["generating prior images beside the run"] += 1
            elif other is not None:
                finished(other)
            if done["kills"]:
                continue
            finished(process)
            break
        different = [what for what, value in left_by(name).items() if not equal(whole[what], value)]
        print(f"{name}: {counts['kills']} kills so far; different: {different or 'nothing'}", flush=True)
        counts["runs that differ"] += bool(different)
        counts["steps"] += ends["steps"]
        counts["steps done again"] += STEPS.value - ends["steps"]
    return counts, phases


KILLED = "killed: "
FIGURES = ("kills", "pauses", "runs", "steps", "steps done again", "runs that differ", "torn files")


def table(counts: Counter, phases: Counter) -> str:
    rows = [f"| {name} | {counts[name]} |" for name in FIGURES]
    rows += [f"| {KILLED}{name} | {count} |" for name, count in phases.most_common()]
    return "\n".join(["| | |", "|---|---|", *rows])


def read_table(text: str) -> tuple[Counter, Counter]:
    """What `table` wrote."""
    rows = {name: int(count) for name, count in re.findall(r"^\| ([^|]+) \| (\d+) \|$", text, re.M)}
    counts = Counter({name: count for name, count in rows.items() if name in FIGURES})
    return counts, Counter({n.removeprefix(KILLED): c for n, c in rows.items() if n.startswith(KILLED)})


def work(options: Namespace, overrides: Sequence[str]) -> int:
    """Soaks a job in a temporary folder, prints the table -> 1 if anything differed or was torn."""
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    report = options.report.resolve() if options.report else None
    subject = parse(["--base", *options.base, *overrides]).data["params"]["subject_root"]
    files = [str(Path(path).resolve()) for path in options.base]
    command = ["--base", *files, f"data.params.subject_root={Path(subject).resolve()}", *SMALL, *overrides]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            counts, phases = soak(command, kills=options.kills, moments=random.Random(options.seed))
        except SystemExit:
            print(Path("soak.log").read_text(errors="replace")[-4000:], file=sys.stderr)
            raise
        finally:
            os.chdir(Path(__file__).parent)
    failed = bool(counts["runs that differ"] or counts["torn files"])
    print(table(counts, phases))
    if report is not None:
        if options.add:
            earlier = read_table(read_section(report, "soak"))
            counts, phases = counts + earlier[0], phases + earlier[1]
        write_section(report, "soak", table(counts, phases))
    return int(failed)
