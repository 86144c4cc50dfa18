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
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.soak_compare import equal, folders, left_by, torn
from ldm.config import instantiate, param_of
from ldm.files import read_section, write_section
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
RUN = "logs/{name}*"
WRITING = {  # phase -> the unfinished files that show it; a phase without any is struck by the clock
    "start and prior images": [],
    "writing a prior image": ["{priors}/*/.*.tmp"],
    "samples before training": [f"{RUN}/samples/before/.*.tmp"],
    "encoding latents": ["{latents}/.*.tmp"],
    "training": [],
    "writing a checkpoint": [f"{RUN}/checkpoints/.*.tmp"],
    "after training": [],
    "writing model, pictures or metrics": [f"{RUN}/.model*.tmp", f"{RUN}/samples/.*.tmp", f"{RUN}/.me*.tmp"],
    "writing the report": [f"{RUN}/.report.html.*.tmp"],
}
BY_CLOCK = 0.3  # share of the kills after a random time; the others strike a phase that was struck seldom
ONCE = ("writing the report",)  # phases that write a single file
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


def aim(moments: random.Random, now: str, struck: Counter) -> str | None:
    """The phase that the next kill is meant for, the sooner the more seldom it was struck; None: any time.

    now: the phase at which the attempt before ended; earlier ones do not come again.
    """
    order = list(WRITING)
    ahead = [phase for phase in order[order.index(now) :] if WRITING[phase]]
    if not ahead or moments.random() < BY_CLOCK:
        return None
    two = moments.choices(ahead, [1 / (1 + struck[phase]) ** 2 for phase in ahead], k=2)
    return min(two, key=order.index)  # a late phase ends the chances of those before it


def strike(
    process: multiprocessing.Process, moments: random.Random, seconds: float, name: str, at: str | None
) -> Counter:
    """Kills a process after a random time or, in the phase `at`, as a file is being written.

    A process that has begun to write is held (SIGSTOP): it is killed if its file is unfinished, and goes on
    to its next file if not. -> "kills": 1, unless it ended by itself; "pauses": how often it was continued.
    """
    wait = LONGEST if at else moments.uniform(0, 0.7 * seconds)
    pause = moments.uniform(0, min(wait, seconds)) if moments.random() < PAUSED else wait
    number = 1 if at in ONCE else moments.randint(1, 4)  # of the file
    start, done, paused = time.monotonic(), Counter(), False
    older, seen = left_unfinished(name), set()
    while process.is_alive() and time.monotonic() - start < wait:
        fresh = unfinished(name, at) - seen - older if at else set()
        seen |= fresh
        if fresh and len(seen) >= number:
            hold(process, 0.002)
            if any(file.exists() for file in fresh):
                break
            done["pauses"] += go_on(process)
        elif time.monotonic() - start > pause and not paused:
            hold(process, moments.uniform(0, 0.5))
            done["pauses"] += go_on(process)
            paused = True
        time.sleep(0.002)
    process.kill()
    process.join()
    done["kills"] += process.exitcode == -signal.SIGKILL
    return done


def unfinished(name: str, phase: str) -> set[Path]:
    return {
        path for pattern in WRITING[phase] for path in Path().glob(pattern.format(name=name, **folders(name)))
    }


def hold(process: multiprocessing.Process, seconds: float) -> None:
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGSTOP)
    time.sleep(seconds)


def go_on(process: multiprocessing.Process) -> bool:
    """Continues a process that was held -> whether it is still there."""
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGCONT)
        return process.is_alive()
    return False


def left_unfinished(name: str) -> set[Path]:
    """All that killed attempts at a run left half written."""
    return {path for phase in WRITING for path in unfinished(name, phase)}


def phase(name: str, ends: Mapping[str, int], *, older: Set[Path] = frozenset()) -> str:
    """What a killed attempt was at, by what it left and by how many files there are in the end.

    ends: numbers of prior images, latents and steps. older: what was left before that attempt.
    """
    left = left_unfinished(name) - older
    for what in reversed(WRITING):
        if left & unfinished(name, what):
            return what
    shared = {what: Path(folder) for what, folder in folders(name).items()}
    if len(list(shared["priors"].glob("*/*.safetensors"))) < ends["priors"]:
        return "start and prior images"
    if len(list(shared["latents"].glob("*.safetensors"))) < ends["latents"]:
        return "encoding latents" if shared["latents"].exists() else "samples before training"
    done = list(Path("logs").glob(f"{name}*/checkpoints/step-{ends['steps']:08d}.ckpt"))
    return "after training" if done else "training"


@dataclass
class Soak:
    """Runs of one command, each killed again and again until it ends, and what came of them.

    seconds: that an undisturbed run takes. phases: kills by phase. struck: of earlier soaks, by phase.
    """

    words: list[str]
    moments: random.Random
    ends: Mapping[str, int]
    seconds: float
    struck: Counter
    counts: Counter = field(default_factory=Counter)
    phases: Counter = field(default_factory=Counter)

    def run_through(self, name: str, kills: int) -> None:
        """One run to its end; it is killed no more once there were so many kills."""
        STEPS.value, ended = 0, False
        while not ended and self.counts["kills"] < kills:
            ended = not self._killed(name)
        if not ended:
            finished(forked(attempt, job_of(self.words, name)))
        self.counts["runs"] += 1
        self.counts["steps"] += self.ends["steps"]
        self.counts["steps done again"] += STEPS.value - self.ends["steps"]

    def _killed(self, name: str) -> bool:
        """One attempt -> whether it was killed."""
        older, now = left_unfinished(name), phase(name, self.ends)
        has_priors = list(WRITING).index(now) > list(WRITING).index("writing a prior image")
        other = None
        if not has_priors and self.moments.random() < BESIDE:
            other = forked(prior_images, job_of(self.words, name))
        process = forked(attempt, job_of(self.words, name))
        if other is not None and self.moments.random() < 0.5:
            self._strike(other, name, "writing a prior image", "generating prior images beside the run")
        killed = self._strike(process, name, aim(self.moments, now, self.struck + self.phases), None, older)
        if other is not None and other.exitcode != -signal.SIGKILL:
            finished(other)
        if not killed and process.exitcode:
            raise SystemExit(f"an attempt ended with {process.exitcode}")
        return killed

    def _strike(
        self,
        process: multiprocessing.Process,
        name: str,
        at: str | None,
        counted_as: str | None,
        older: Set[Path] = frozenset(),
    ) -> bool:
        done = strike(process, self.moments, self.seconds, name, at)
        self.counts += done
        if done["kills"]:
            self.phases[counted_as or phase(name, self.ends, older=older)] += 1
            self.counts["torn files"] += len(torn(name))
        return bool(done["kills"])


def job_of(words: list[str], name: str) -> list[str]:
    """The command of a run that shares nothing with others."""
    shared = folders(name)
    return [
        *(*words, f"name={name}"),
        *(f"priors.folder={shared['priors']}", f"data.params.cache_root={shared['latents']}"),
    ]


def soak(words: list[str], *, kills: int, moments: random.Random, struck: Counter) -> tuple[Counter, Counter]:
    """Runs until they were killed `kills` times -> figures, and kills by phase."""
    config = parse(job_of(words, "whole"))
    finished(forked(make_base, words))
    start = time.monotonic()
    finished(forked(attempt, job_of(words, "whole")))
    seconds, whole = time.monotonic() - start, left_by("whole")
    ends = {
        "priors": param_of(config.data, "num_priors"),
        "latents": len(list(Path(folders("whole")["latents"]).glob("*.safetensors"))),
        "steps": config.trainer.max_steps,
    }
    runs = Soak(words, moments, ends, seconds, struck)
    while runs.counts["kills"] < kills:
        name = f"run{runs.counts['runs'] + 1}"
        runs.run_through(name, kills)
        different = [what for what, value in left_by(name).items() if not equal(whole[what], value)]
        print(f"{name}: {runs.counts['kills']} kills so far; different: {different or 'nothing'}", flush=True)
        runs.counts["runs that differ"] += bool(different)
    return runs.counts, runs.phases


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
    earlier = read_table(read_section(report, "soak")) if report and options.add else (Counter(), Counter())
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            moments = random.Random(options.seed)
            counts, phases = soak(command, kills=options.kills, moments=moments, struck=earlier[1])
        except SystemExit:
            print(Path("soak.log").read_text(errors="replace")[-4000:], file=sys.stderr)
            raise
        finally:
            os.chdir(Path(__file__).parent)
    failed = bool(counts["runs that differ"] or counts["torn files"])
    print(table(counts, phases))
    if report is not None:
        write_section(report, "soak", table(counts + earlier[0], phases + earlier[1]))
    return int(failed)
