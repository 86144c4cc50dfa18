"""Kills a DreamBooth job at random moments, resumes it, and compares what it leaves with an undisturbed run.

    python scripts/soak.py --kills 100 [--base configs/dreambooth.yaml] [key.sub=value ...]

Every attempt is a process that does what `main.py --resume auto` does, forked after the imports, so that
SIGKILL strikes the work: after a random time, or just as a file is being written. The networks are the
config's, made small, with random weights. The status is 1 if a single bit differs.
"""

import argparse
import logging
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

from ldm.config import instantiate, param_of
from ldm.data.images import load_image
from ldm.files import write_section
from ldm.reports.curves import read_curves
from ldm.training.job import run_job
from ldm.training.options import parse
from ldm.training.resume import by_step, validate_checkpoint

SMALL = [
    "model.params.unet.params.model_channels=16",
    *("data.params.size=32", "data.params.batch_size=1", "data.params.num_priors=24"),
    *("priors.steps=8", "priors.batch_size=2", "base_checkpoint=base.safetensors"),
    *("trainer.max_steps=12", "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=8"),
    *("trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu"),
    *("checkpoint_every=2", "ema_decay=0.9", "evaluation=null", "online_eval.every_steps=0"),
    *("samples.n=1", "samples.steps=2", "samples.every_steps=6"),
]
PATTERNS = ["{priors}/*/.*.tmp", "logs/{name}*/checkpoints/.*.tmp", "logs/{name}*/.model*.tmp"]
PATTERNS += ["logs/{name}*/samples/.*.tmp", "logs/{name}*/.[!m]*.tmp"]  # pictures; config, report, figures
LONGEST = 600  # seconds that an attempt may take before it counts as hanging
FORK = multiprocessing.get_context("fork")
STEPS = FORK.Value("i", 0)  # optimizer steps of all attempts at one run


def attempt(words: list[str]) -> None:
    """`main.py --resume auto`, in a process of its own; what it says goes to soak.log."""
    log = os.open("soak.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)

    def count(*_: object) -> None:
        STEPS.value += 1

    register_optimizer_step_post_hook(count)
    try:
        run_job(parse(words), "auto")
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


def strike(process: multiprocessing.Process, moments: random.Random, seconds: float, name: str) -> bool:
    """Kills a process after a random time or, half the time, as a random file is written before then.

    False if it ended by itself.
    """
    pattern, number = moments.choice([*[None] * len(PATTERNS), *PATTERNS]), moments.randint(1, 4)
    start, wait, seen = time.monotonic(), moments.uniform(0, 0.7 * seconds), set()
    wait = wait if pattern is None else seconds
    while process.is_alive() and len(seen) < number and time.monotonic() - start < wait:
        if pattern is not None:
            seen |= set(Path().glob(pattern.format(name=name, priors=f"priors-{name}")))
        time.sleep(0.0005)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def phase(name: str, priors: int, steps: int) -> str:
    """What a killed attempt was at, by what it left."""
    left = [path.relative_to("logs").parts[1] for path in Path("logs").glob(f"{name}*/**/.*.tmp")]
    if "checkpoints" in left:
        return "writing a checkpoint"
    if left:
        return "writing model, pictures or report"
    if len(list(Path(f"priors-{name}").glob("*/*.safetensors"))) < priors:
        writing = any(Path(f"priors-{name}").glob("*/.*.tmp"))
        return "writing a prior image" if writing else "start and prior images"
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
    priors = sorted(Path(f"priors-{name}").glob("*/[0-9]*"))
    latents = {p.name: load_file(p) for p in priors if p.suffix == ".safetensors"}
    return {
        "model": load_file(model),
        "checkpoint": state,
        "curves": curves,
        "pictures": {str(p.relative_to(folder)): load_image(p).tobytes() for p in pictures},
        "priors": {p.name: p.read_bytes() for p in priors if p.name not in latents} | latents,
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
        return [*words, f"name={name}", f"priors.folder=priors-{name}"]

    config = parse(job_of("whole"))
    priors, steps = param_of(config.data, "num_priors"), config.trainer.max_steps
    finished(forked(make_base, words))
    start = time.monotonic()
    finished(forked(attempt, job_of("whole")))
    seconds, whole = time.monotonic() - start, left_by("whole")
    counts, phases = Counter(), Counter()
    while counts["kills"] < kills:
        counts["runs"] += 1
        name, STEPS.value = f"run{counts['runs']}", 0
        while True:
            process = forked(attempt, job_of(name))
            if counts["kills"] < kills and strike(process, moments, seconds, name):
                counts["kills"] += 1
                phases[phase(name, priors, steps)] += 1
                counts["torn files"] += len(torn(name))
                continue
            finished(process)
            break
        different = [what for what, value in left_by(name).items() if not equal(whole[what], value)]
        print(f"{name}: {counts['kills']} kills so far; different: {different or 'nothing'}", flush=True)
        counts["runs that differ"] += bool(different)
        counts["steps"] += steps
        counts["steps done again"] += STEPS.value - steps
    return counts, phases


def table(counts: Counter, phases: Counter) -> str:
    names = ("kills", "runs", "steps", "steps done again", "runs that differ", "torn files")
    rows = [f"| {name} | {counts[name]} |" for name in names]
    rows += [f"| killed: {name} | {count} |" for name, count in phases.most_common()]
    return "\n".join(["| | |", "|---|---|", *rows])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", nargs="+", default=["configs/dreambooth.yaml"], metavar="YAML")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--report", type=Path, help="Markdown file whose section `soak` gets the figures")
    options, overrides = parser.parse_known_args()
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
    print(table(counts, phases))
    if report is not None:
        write_section(report, "soak", table(counts, phases))
    sys.exit(bool(counts["runs that differ"] or counts["torn files"]))
