"""The runs of a study or a search: kept in folders, found again, and shared among processes."""

import json
import shutil
import subprocess
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar, Self

import torch

from ldm.annotations import PositiveInt, Seed
from ldm.config import check, get_class, instantiate, load_config, save_config, to_container
from ldm.engine.locks import CAN_LOCK, share
from ldm.errors import UserError
from ldm.evaluation.protocol import Better
from ldm.files import atomic_write
from ldm.runs.before_after import evaluation_nodes
from ldm.runs.console import duration
from ldm.runs.folder import MARKER
from ldm.runs.grid_subjects import (
    Subject,
    check_subjects,
    read_group,
    read_mapping,
    slug,
    subject_params,
    without_group,
)
from ldm.runs.inputs import inputs_of, read_inputs
from ldm.runs.job import run_job
from ldm.runs.online_eval import Watch
from ldm.runs.options import merge
from ldm.runs.run import base_files
from ldm.schema import RunConfig


@dataclass(frozen=True)
class Job:
    """One run: what varies, and its whole config."""

    variant: str
    subject: str
    seed: int
    config: RunConfig = field(compare=False)

    @property
    def folder(self) -> Path:
        return Path("logs", self.config.name)

    @property
    def begun(self) -> Path | None:
        """Its folder, if it was begun and is not finished."""
        return self.folder if (self.folder / MARKER).exists() else None


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Runs of variants of a config, each on every subject with every seed, from a YAML file.

    name: of the file. title: what it is about. base: configs to merge; set: overrides of all runs; subjects:
    by name, or a group that studies share, `FILE:GROUP`; threads: of a run on the CPU, whose sums depend on
    their number.
    """

    KIND: ClassVar[str]

    name: str
    title: str
    base: Sequence[str]
    subjects: Mapping[str, Subject]
    seeds: Sequence[Seed]
    set: Sequence[str] = ()
    threads: PositiveInt = 1

    @classmethod
    def read(cls, path: str | Path, **given: Any) -> Self:
        """A YAML file -> what it describes; `given` are keys that the file cannot have.

        Raises UserError for what is missing, unknown or of another type.
        """
        content = read_mapping(path, cls.KIND)
        if isinstance(content.get("subjects"), str):
            content["subjects"] = read_group(content["subjects"], path)
        keys = {f.name: f for f in fields(cls) if f.name not in ("name", *given)}
        remedy = f"It has the keys {', '.join(keys)}."
        for key in content:
            if key not in keys:
                raise UserError(f"`{key}` is not a key of a {cls.KIND}", where=path, remedy=remedy)
        for key, own in keys.items():
            if own.default is own.default_factory is MISSING and not content.get(key):
                what = f"`{key}` is missing or empty"
                raise UserError(what, where=path, remedy=f"Every {cls.KIND} needs it.")
        check(content, typing.get_type_hints(cls, include_extras=True), paths=[path])
        grid = cls(name=Path(path).stem, **content, **given)
        grid.check(path)
        return grid

    def check(self, path: str | Path) -> None:
        """Raises UserError for subjects that are not complete, and for names that would share a folder."""
        check_subjects(self.subjects, path)
        check_slugs("subjects", self.subjects, path)

    @property
    def folder(self) -> Path:
        return Path("logs", f"{self.KIND}-{self.name}")

    def jobs(self, variant: str, overrides: Sequence[str]) -> list[Job]:
        """The runs of a variant with their checked configs; writes the photos of storybook subjects."""
        pairs = product(self.subjects, self.seeds)
        return [self.job(variant, subject, seed, overrides) for subject, seed in pairs]

    def job(self, variant: str, subject: str, seed: int, overrides: Sequence[str]) -> Job:
        """One of them."""
        run = f"{slug(variant)}--{slug(subject)}--{seed}"
        own: dict[str, Any] = {"name": f"{self.folder.name}/{run}", "seed": seed}
        params = subject_params(subject, self.subjects, self.folder / "subjects")
        own |= {f"data.params.{key}": value for key, value in params.items()}
        config = merge(self.base, [*self.set, *overrides], literals=own)
        return Job(variant, subject, seed, config)


def check_slugs(kind: str, names: Sequence[str] | Mapping[str, Any], path: str | Path) -> None:
    """Raises UserError for two names whose runs would share a folder."""
    slugs: dict[str, str] = {}
    for name in names:
        if slug(name) in slugs:
            what = f"`{name}` and `{slugs[slug(name)]}` of {kind} would share a folder"
            raise UserError(what, where=path, remedy="Name them further apart.")
        slugs[slug(name)] = name


def better_of(config: RunConfig) -> Mapping[str, Better]:
    """The metrics of a config's evaluation by the direction in which they are better; none without one."""
    node = config.evaluation
    return getattr(get_class(node["target"]), "better", {}) if node else {}


def identity(container: Mapping[str, Any]) -> dict[str, Any]:
    """A config's content but for the name of its study, in whose folder storybook subjects are too."""
    content = to_container(container)
    group = Path(content.pop("name")).parts[0]
    content["data"]["params"] = without_group(content["data"]["params"], group)
    return content


@cache
def _identity_of(path: Path) -> dict[str, Any]:
    """Of a finished run, by the absolute path of its config."""
    return identity(to_container(load_config([path])))


def find_identical_run(job: Job) -> Path | None:
    """The folder of an identical run that another study or search has finished."""
    folders = (path.parent for path in sorted(Path("logs").glob("*-*/[!.]*--*--*/metrics.json")))
    folders = (folder for folder in folders if not (folder / MARKER).exists())
    wanted = identity(job.config.container)
    same = (f for f in folders if _identity_of((f / "config.yaml").resolve()) == wanted)
    return next((f for f in same if not _changes_since(f, job.config)), None)


def _changes_since(folder: Path, config: RunConfig) -> list[str]:
    """Which files are not as a finished run read them; none, for a run that kept no hashes."""
    before = read_inputs(folder)
    if before is None:
        return []
    evaluations = evaluation_nodes(config).values()
    return before.changes(inputs_of(instantiate(config.data), base_files(config), evaluations))


def metrics_of(job: Job) -> dict | None:
    """Metrics of a finished run. Raises UserError if they are of another config or of other files."""
    path = job.folder / "metrics.json"
    if not path.exists():
        return None
    if to_container(load_config([job.folder / "config.yaml"])) != job.config.container:
        changes = ["The settings have changed since this run"]
    else:
        changes = _changes_since(job.folder, job.config)
    if changes:
        remedy = "Remove the run's folder, or name the study or search anew."
        raise UserError(". ".join(changes), where=job.folder, remedy=remedy)
    return _read_metrics(job)


def _read_metrics(job: Job) -> dict:
    return json.loads((job.folder / "metrics.json").read_text(encoding="utf-8"))


def metric_of(metrics: Mapping[str, Any], name: str, *, where: Path) -> float:
    """A run's metric. Raises UserError where the run has none, as of a subject that cannot be judged."""
    if name not in metrics:
        what, remedy = f"The run has no `{name}`", f"It has {', '.join(metrics)}."
        raise UserError(what, where=where, remedy=remedy)
    return metrics[name]


def finish(job: Job, watch: Watch | None = None) -> dict:
    """Begins a run, or goes on with it, unless it or an identical one is finished -> its metrics.

    To be called by the one process that works on it. watch: sees each row of online evaluation.
    """
    if (metrics := metrics_of(job)) is None:
        identical = find_identical_run(job)
        if identical is None:
            _train(job, watch)
            return _read_metrics(job)
        print(f"as in {identical}", flush=True)
        _copy(identical, job)
        metrics = _read_metrics(job)
    for row in metrics.get("measures", ()) if watch else ():
        watch(row)
    return metrics


def _train(job: Job, watch: Watch | None) -> None:
    """Trains to the end; a run that was killed continues where it was."""
    if not job.begun:
        shutil.rmtree(job.folder, ignore_errors=True)  # what was killed before it had begun
    run_job(job.config, "auto", watch=watch)
    drop_checkpoints(job)


def _copy(identical: Path, job: Job) -> None:
    """The folder of an identical run as this one's, whole or not at all."""
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = job.folder.with_name(f".{job.folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(identical, temporary, ignore=shutil.ignore_patterns("checkpoints"))
    save_config(job.config.source, temporary / "config.yaml")
    shutil.rmtree(job.folder, ignore_errors=True)
    temporary.rename(job.folder)


def drop_checkpoints(job: Job) -> None:
    """Removes the checkpoints of a run that nobody will continue."""
    shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)


def work(grid: Grid, jobs: Sequence[Job], *, left: Callable[[], str] = str) -> None:
    """Runs all jobs that are not finished and that no other process works on, until there are none.

    left: says how much time is left, before each run.
    """
    torch.set_num_threads(grid.threads)
    by_name = {job.folder.name: job for job in jobs}

    def run(number: int, name: str) -> None:
        said = [f"{grid.name}, run {number} of {len(jobs)}: {name}", left()]
        print("; ".join(filter(None, said)), flush=True)
        finish(by_name[name])

    locks = grid.folder / "locks"
    share(list(by_name), locks, is_done=lambda name: metrics_of(by_name[name]) is not None, finish=run)


def time_left(jobs: Sequence[Job], *, processes: int) -> str:
    """Of unfinished runs, as long as finished ones of their variant or else of any; "" before the first."""
    taken: dict[str, list[float]] = {}
    unfinished = []
    for job in jobs:
        if (job.folder / "metrics.json").exists():
            taken.setdefault(job.variant, []).append(sum(_read_metrics(job)["seconds"].values()))
        else:
            unfinished.append(job.variant)
    every = [seconds for group in taken.values() for seconds in group]
    if not every:
        return ""
    seconds = sum(mean(taken.get(variant, every)) for variant in unfinished)
    return f"about {duration(seconds / min(processes, max(1, len(unfinished))))} left"


def run_in_processes(script: str, words: Sequence[str], processes: int) -> None:
    """Runs a command of this repository in several processes, which are told `--worker`.

    A signal to this process, also Ctrl+C, is one to each of them: they save and end. Raises UserError if one
    of them fails.
    """
    if not CAN_LOCK:
        what = "On this system processes cannot tell which runs the others work on"
        raise UserError(what, where="--processes", remedy="Take it off.")
    command = [sys.executable, script, *words, "--worker"]
    running = [subprocess.Popen(command, start_new_session=True) for _ in range(processes)]
    try:
        failed = any([process.wait() for process in running])
    except BaseException:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        raise
    if failed:
        what = "A process has failed; what was finished is kept"
        raise UserError(what, remedy="See its message above, and run the command again.")


def write_text(path: Path, text: str) -> Path:
    """Writes a text file, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
