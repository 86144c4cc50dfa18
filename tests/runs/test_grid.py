"""The runs of a grid: each made once, by whatever number of processes, of which some are killed."""

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from ldm.config import instantiate, save_config
from ldm.engine.signals import Stopped
from ldm.errors import UserError
from ldm.runs.before_after import evaluation_nodes
from ldm.runs.folder import MARKER
from ldm.runs.grid import (
    Job,
    duration,
    find_identical_run,
    finish,
    metrics_of,
    run_in_processes,
    time_left,
    work,
)
from ldm.runs.inputs import inputs_of
from ldm.runs.run import base_files
from ldm.runs.sweep import Sweep, jobs_of, read_sweep
from ldm.storybook.judge import SHIPPED
from tests.runs.test_sweep import CONTENT, write
from tests.short_runs import Killed, ScriptedRuns

FORK = multiprocessing.get_context("fork")
METRICS = {"subject_fidelity": 0.5, "prompt_fidelity": 0.5, "class_drift": 0.0, "diversity_ratio": 1.0}
Script = Callable[..., ScriptedRuns]


@pytest.fixture
def study(workdir: Path) -> tuple[Sweep, list[Job]]:
    sweep = read_sweep(write(workdir))
    return sweep, jobs_of(sweep)


def keep_inputs(job: Job, **changed: dict[str, str]) -> None:
    """What a run keeps of the files that it reads, of which some are of another content."""
    evaluations = evaluation_nodes(job.config).values()
    read = inputs_of(instantiate(job.config.data), base_files(job.config), evaluations)
    (job.folder / "inputs.json").write_text(json.dumps(asdict(replace(read, **changed))))


def write_down(name: str, step: int) -> None:
    """One line in a file of all processes."""
    time.sleep(0.02)
    with open("steps.txt", "a") as file:
        file.write(f"{os.getpid()} {name} {step}\n")


def in_processes(count: int, act: Callable[[int], None]) -> list[int]:
    """Calls a function of its number in each of some processes -> their exit statuses."""
    processes = [FORK.Process(target=act, args=(k,)) for k in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def test_processes_share_the_runs(study: tuple, script: Script):
    script(lambda config, share: METRICS, write_down)
    assert in_processes(3, lambda k: work(*study)) == [0, 0, 0]
    lines = [line.split() for line in Path("steps.txt").read_text().splitlines()]
    wanted = {(f"study-weights/{job.folder.name}", str(step)) for job in study[1] for step in (1, 2, 3, 4)}
    assert Counter((name, step) for _, name, step in lines) == Counter(dict.fromkeys(wanted, 1))
    assert len({pid for pid, _, _ in lines}) > 1


def test_a_killed_process_leaves_its_run_to_the_others(study: tuple, script: Script):
    sweep, jobs = study

    def step(name: str, number: int) -> None:
        if name.endswith("weight-0--rex--2") and number == 3 and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        write_down(name, number)

    script(lambda config, share: METRICS, step)
    assert in_processes(1, lambda k: work(sweep, jobs)) == [-signal.SIGKILL]
    assert (jobs[1].folder / MARKER).exists() and metrics_of(jobs[1]) is None
    work(sweep, jobs)
    lines = [line.split()[1:] for line in Path("steps.txt").read_text().splitlines()]
    assert len(lines) == 4 * len(jobs) == len({tuple(line) for line in lines})  # no step twice
    assert all(metrics_of(job) for job in jobs) and not list(Path("logs").glob("*/*-2-2"))
    assert not list(Path("logs").glob("*/*/checkpoints"))


def test_a_run_that_was_killed_before_it_began_keeps_its_folder(study: tuple, script: Script):
    sweep, jobs = study
    script(lambda config, share: METRICS)
    jobs[0].folder.mkdir(parents=True)
    (jobs[0].folder / "config.yaml").touch()
    work(sweep, jobs[:1])
    assert metrics_of(jobs[0]) and not jobs[0].folder.with_name(f"{jobs[0].folder.name}-2").exists()


def test_a_run_of_another_study_is_copied_whole(study: tuple, script: Script, workdir: Path):
    sweep, jobs = study
    runs = script(lambda config, share: METRICS)
    work(sweep, jobs)
    (workdir / "other.yaml").write_text(yaml.safe_dump(CONTENT, sort_keys=False))
    (job, other, *_) = jobs_of(read_sweep(workdir / "other.yaml"))
    killed = job.folder.parent / f".{job.folder.name}.tmp"  # an earlier copy
    killed.mkdir(parents=True)
    (killed / "metrics.json").touch()
    (jobs[0].folder / "checkpoints").mkdir()  # about to be removed by who has made the run
    made, rows = len(runs.steps), []
    metrics = finish(job, watch=rows.append)
    assert len(runs.steps) == made and metrics == metrics_of(jobs[0]) == metrics_of(job)
    assert rows == metrics["measures"] and len(rows) == 4
    assert not (job.folder / "checkpoints").exists() and not killed.exists()
    (jobs[1].folder / MARKER).touch()  # its report is still to be written
    assert find_identical_run(other) is None
    (jobs[1].folder / MARKER).unlink()
    assert find_identical_run(other) == jobs[1].folder
    for run in jobs[:2]:
        keep_inputs(run, base={"base.safetensors": "of another base"})
    assert find_identical_run(other) is None
    with pytest.raises(UserError, match="The base model's files have changed since this run"):
        metrics_of(jobs[1])
    save_config(jobs[3].config.source, jobs[2].folder / "config.yaml")
    with pytest.raises(UserError, match="The settings have changed since this run"):
        metrics_of(jobs[2])


def test_a_run_on_other_photos_is_another_run(study: tuple, script: Script, workdir: Path):
    """A storybook subject's seed is in no config, and a folder's photos may be exchanged."""
    sweep, jobs = study
    runs = script(lambda config, share: METRICS)
    work(sweep, jobs)
    for job in jobs[:2]:
        keep_inputs(job)
    assert metrics_of(jobs[0]) == metrics_of(jobs[1])
    rex = {"rex": {"class_word": "dog", "seed": 52}}
    changed = CONTENT | {"subjects": CONTENT["subjects"] | rex}
    (workdir / "other.yaml").write_text(yaml.safe_dump(changed, sort_keys=False))
    (job, *_) = jobs_of(read_sweep(workdir / "other.yaml"))
    assert find_identical_run(job) is None
    made = len(runs.steps)
    finish(job)
    assert len(runs.steps) > made, "trained, not copied"
    (workdir / "weights.yaml").write_text((workdir / "other.yaml").read_text())
    (job, *_) = jobs_of(read_sweep(workdir / "weights.yaml"))  # draws the other dog
    with pytest.raises(UserError, match="The subject's photos have changed since this run"):
        metrics_of(job)


def test_a_run_with_another_judge_is_another_run(workdir: Path, script: Script):
    """Its file is named in the config, and its content is not."""
    shutil.copy(SHIPPED, "judge.safetensors")
    own = {"set": [*CONTENT["set"], "evaluation.params.judge_file=judge.safetensors"]}
    sweep = read_sweep(write(workdir, **own))
    (job, *_) = jobs_of(sweep)
    script(lambda config, share: METRICS)
    work(sweep, [job])
    keep_inputs(job)
    (workdir / "other.yaml").write_text(yaml.safe_dump(CONTENT | own, sort_keys=False))
    (other, *_) = jobs_of(read_sweep(workdir / "other.yaml"))
    assert metrics_of(job) and find_identical_run(other) == job.folder
    Path("judge.safetensors").write_bytes(b"another judge")
    assert find_identical_run(other) is None
    with pytest.raises(UserError, match="The evaluation's own files have changed since this run"):
        metrics_of(job)


def test_time_left(study: tuple, script: Script):
    sweep, jobs = study
    assert time_left(jobs, processes=2) == ""
    script(lambda config, share: METRICS)
    work(sweep, jobs[:1])
    assert time_left(jobs, processes=2) == "about 35 s left"  # 7 runs of 10 s
    work(sweep, jobs[4:5])
    path = jobs[4].folder / "metrics.json"
    path.write_text(json.dumps(METRICS | {"seconds": {"training": 2000.0, "samples_after": 400.0}}))
    assert time_left(jobs, processes=1) == "about 2 h 00 min left"  # 3 of 10 s, 3 of 2400 s
    assert time_left(jobs[:1], processes=2) == "about 0 s left"
    assert [duration(s) for s in (89.4, 90, 3599, 3660)] == ["89 s", "2 min", "1 h 00 min", "1 h 01 min"]


def test_a_kill_inside_this_process_frees_the_run(study: tuple, script: Script):
    sweep, jobs = study
    runs = script(lambda config, share: METRICS)
    runs.before_step = lambda name, step: (_ for _ in ()).throw(Killed) if step == 2 else None
    with pytest.raises(Killed):
        work(sweep, jobs[:1])
    runs.before_step = lambda name, step: None
    work(sweep, jobs[:1])
    assert [step for _, step in runs.steps] == [1, 2, 3, 4]


CHILD = """
import os, pathlib, signal, sys, time
def end(*rest):
    pathlib.Path(f"ended-{os.getpid()}").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
pathlib.Path(f"begun-{os.getpid()}").write_text(" ".join(sys.argv[1:]))
time.sleep("--sleep" in sys.argv and 60)
sys.exit("--fail" in sys.argv)
"""


def test_a_signal_ends_all_processes_and_they_are_waited_for(workdir: Path):
    (workdir / "child.py").write_text(CHILD)

    def stop(signum: int, frame: object) -> None:
        raise Stopped(signum)

    def when_both_have_begun() -> None:
        while len([path for path in workdir.glob("begun-*") if path.stat().st_size]) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, stop)
    threading.Thread(target=when_both_have_begun, daemon=True).start()
    try:
        with pytest.raises(Stopped):
            run_in_processes("child.py", ["--allow", "mine", "--sleep"], 2)
    finally:
        signal.signal(signal.SIGALRM, before)
    begun, ended = ({path.name.split("-")[1] for path in workdir.glob(f"{k}-*")} for k in ("begun", "ended"))
    assert begun == ended and len(ended) == 2
    assert {path.read_text() for path in workdir.glob("begun-*")} == {"--allow mine --sleep --worker"}


def test_a_process_that_fails_is_told(workdir: Path):
    (workdir / "child.py").write_text(CHILD)
    run_in_processes("child.py", [], 1)
    with pytest.raises(UserError, match="A process has failed"):
        run_in_processes("child.py", ["--fail"], 2)
