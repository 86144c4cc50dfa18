"""The trials of a search, in a storage of Optuna's that any number of processes share.

A trial belongs to the process that holds its lock, a file beside the storage. A killed process holds none,
and the next one goes on with its trial, under the same number, from the checkpoints of its runs.
"""

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from ldm.config import instantiate
from ldm.engine.locks import claim, exclusive
from ldm.engine.non_finite import NonFiniteError
from ldm.engine.resume import config_changes
from ldm.errors import UserError
from ldm.files import make_folder
from ldm.reports.search_page import Result, trial_name
from ldm.runs.grid import Job, drop_checkpoints, duration, finish, metric_of
from ldm.runs.inputs import base_hash
from ldm.runs.run import base_files
from ldm.runs.search import SCORE, Range, Search, overrides_of
from ldm.runs.validate import validate

if TYPE_CHECKING:
    import optuna

Curve = Mapping[str, Sequence[float]]  # "run/step", or "run/end" -> a value for each metric of the search
SQLITE, JOURNAL = (".db", ".sqlite", ".sqlite3"), (".journal", ".log")
END = "end"


class Pruned(Exception):
    """A trial ends early: most others were better at the same point."""


class Refused(Exception):
    """The settings of a trial do not go together."""


def import_optuna() -> ModuleType:
    """Raises UserError where it is not installed."""
    try:
        import optuna
    except ImportError as error:
        remedy = 'Install it: pip install -c constraints.txt -e ".[search]".'
        raise UserError("A search needs Optuna, which is not installed", remedy=remedy) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


class Trials:
    """The trials of a search. Raises UserError for a storage that cannot be read, or is of another search.

    path: a file of SQLite (.db) or a journal (.journal), which alone is safe on a network file system.
    """

    def __init__(self, search: Search, path: Path):
        self.search = search
        self.path = path
        self.locks = path.with_name(f"{path.name}.locks")
        self.optuna = import_optuna()
        self.signs = search.signs()
        if path.suffix not in (*SQLITE, *JOURNAL):
            remedy = f"Name a file of SQLite, {SQLITE[0]}, or a journal, {JOURNAL[0]}."
            raise UserError("A search is not kept in such a file", where=path, remedy=remedy)
        make_folder(path.parent)
        with exclusive(self.locks / "all"):
            try:
                self.study = self._open()
            except UserError:
                raise
            except Exception as error:  # SQLAlchemy's, json's and Optuna's own have no class in common
                remedy = "Name another file, or remove it: the search then begins anew."
                what = f"The search's storage cannot be read: {str(error).splitlines()[0]}"
                raise UserError(what, where=path, remedy=remedy) from error

    def _open(self) -> "optuna.Study":
        optuna, search = self.optuna, self.search
        if self.path.suffix in SQLITE:
            wait = {"connect_args": {"timeout": 100}}
            storage = optuna.storages.RDBStorage(f"sqlite:///{self.path}", engine_kwargs=wait)
        else:
            mend_journal(self.path, optuna.storages.journal.JournalFileSymlinkLock(str(self.path)))
            backend = optuna.storages.journal.JournalFileBackend(str(self.path))
            storage = optuna.storages.JournalStorage(backend)
        now = contents_of(search)
        if search.name not in optuna.get_all_study_names(storage):
            directions = ["maximize" if sign > 0 else "minimize" for sign in self.signs]
            study = optuna.create_study(study_name=search.name, storage=storage, directions=directions)
        else:
            study = optuna.load_study(study_name=search.name, storage=storage)
        before = study.user_attrs.get("search")
        if before is None:
            study.set_user_attr("search", now)
        elif changes := config_changes(before, now):
            what = f"The search has changed since it began: {'; '.join(changes)}"
            raise UserError(what, where=self.path, remedy="Restore it, or rename its file and begin anew.")
        return study

    @contextmanager
    def next_trial(self) -> Iterator["optuna.Trial | None"]:
        """A killed trial, or a new one, until the block is left; None if all are begun and none is killed."""
        with ExitStack() as locks:
            with exclusive(self.locks / "all"):
                trial = self._killed(locks) or self._new(locks)
            yield trial

    def _killed(self, locks: ExitStack) -> "optuna.Trial | None":
        running = (self.optuna.trial.TrialState.RUNNING,)
        for frozen in self.study.get_trials(deepcopy=False, states=running):
            if locks.enter_context(claim(self.locks / f"{frozen.number:04d}")):
                now = self.study.get_trials(deepcopy=False)[frozen.number]
                if now.state in running:  # it may have ended before its lock was free
                    trial = self.optuna.trial.Trial(self.study, frozen._trial_id)
                    self._suggest(trial)
                    return trial
        return None

    def _new(self, locks: ExitStack) -> "optuna.Trial | None":
        """The settings follow from the number of the trial and from what has ended, not from who asks."""
        trials = self.study.get_trials(deepcopy=False)
        begun = sum(trial.state != self.optuna.trial.TrialState.WAITING for trial in trials)
        if begun >= self.search.trials:
            return None
        if not trials and (values := self.search.base_values()) is not None:
            self.study.enqueue_trial(values)
        seed = self.search.random_seed + begun
        self.study.sampler = self.optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        trial = self.study.ask()
        locks.enter_context(claim(self.locks / f"{trial.number:04d}"))
        self._suggest(trial)
        return trial

    def _suggest(self, trial: "optuna.Trial") -> None:
        """Gives each key that has none a value."""
        for key, own in self.search.ranges.items():
            _suggest(trial, key, own)

    def settings(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Key -> value, as a run gets them."""
        return {key: own.rounded(params[key]) for key, own in self.search.ranges.items() if key in params}

    def keep(self, trial: "optuna.Trial", point: str, values: Sequence[float]) -> None:
        """Adds a point to the trial's curve."""
        trial.set_user_attr("curve", {**trial.user_attrs.get("curve", {}), point: list(values)})

    def is_beaten(self, trial: "optuna.Trial", point: str) -> bool:
        """Whether more than half of the finished trials, if enough, were better there in every metric."""
        own = running_mean(trial.user_attrs["curve"], point)
        states = (self.optuna.trial.TrialState.COMPLETE,)
        finished = self.study.get_trials(deepcopy=False, states=states)
        curves = [other.user_attrs["curve"] for other in finished]
        others = [running_mean(curve, point) for curve in curves if point in curve]
        if not 0 < self.search.prune_after <= len(others):
            return False
        return 2 * sum(is_better(other, own, self.signs) for other in others) > len(others)

    def tell(self, trial: "optuna.Trial", values: Sequence[float] | None, *, why: str = "") -> None:
        """Ends a trial, pruned if it has no values."""
        trial.set_user_attr("why", why)
        states = self.optuna.trial.TrialState
        self.study.tell(trial, values, state=states.PRUNED if values is None else states.COMPLETE)

    def results(self) -> list[Result]:
        """Every trial that has begun, in order."""
        runs = list(product(self.search.subjects, self.search.seeds))
        names = {"COMPLETE": "finished", "PRUNED": "pruned", "RUNNING": "unfinished"}
        found = []
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state.name not in names:
                continue
            curve = trial.user_attrs.get("curve", {})
            ends = {k: curve[f"{k}/{END}"] for k in range(len(runs)) if f"{k}/{END}" in curve}
            found.append(
                Result(
                    number=trial.number,
                    state=names[trial.state.name],
                    settings=self.settings(trial.params),
                    rows=[
                        {"variant": trial_name(trial.number), "subject": runs[k][0], "seed": runs[k][1]}
                        | dict(zip(self.search.metrics, values, strict=True))
                        for k, values in ends.items()
                    ],
                    why=trial.user_attrs.get("why", ""),
                    seconds=trial.user_attrs.get("seconds", 0.0),
                )
            )
        return found

    def best(self) -> list[int]:
        """Numbers of the finished trials that no other is better than, in all metrics or the only one."""
        return sorted(trial.number for trial in self.study.best_trials)

    def importances(self) -> dict[str, dict[str, float]]:
        """Metric -> key -> its share, by PED-ANOVA (Watanabe et al. 2023); {} before ten finished trials."""
        if len(self.study.get_trials(deepcopy=False, states=(self.optuna.trial.TrialState.COMPLETE,))) < 10:
            return {}
        evaluator = self.optuna.importance.PedAnovaImportanceEvaluator()
        found = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that low values are taken for good: they are, negated
            for k, (name, sign) in enumerate(zip(self.search.metrics, self.signs, strict=True)):
                found[name] = self.optuna.importance.get_param_importances(
                    self.study,
                    evaluator=evaluator,
                    target=lambda trial, k=k, sign=sign: -sign * trial.values[k],
                )
        return found


def _suggest(trial: "optuna.Trial", key: str, own: Range) -> Any:
    if own.kind == "choice":
        return trial.suggest_categorical(key, list(own.choices))
    if own.kind == "int":
        return trial.suggest_int(key, int(own.low), int(own.high), step=int(own.step or 1))
    return trial.suggest_float(key, own.low, own.high, step=own.step, log=own.kind == "log")


def contents_of(search: Search) -> dict[str, Any]:
    """What trials of one search have in common, as JSON gives it back."""
    kept = {name: asdict(search)[name] for name in ("keys", "metrics", "subjects", "seeds", "random_seed")}
    hashes = {name: base_hash(path) for name, path in base_files(search.config).items()}
    return json.loads(json.dumps({**kept, "config": search.config.container, "base": hashes}))


def mend_journal(path: Path, lock: Any) -> None:
    """Cuts off a last line that a killed process has written in part."""
    if not path.exists():
        return
    lock.acquire()
    try:
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)
    finally:
        lock.release()


def running_mean(curve: Curve, point: str) -> list[float]:
    """Each metric at a point of a run, "2/70", in the mean with the ends of the runs before it."""
    k = int(point.partition("/")[0])
    points = [curve[f"{j}/{END}"] for j in range(k)] + [curve[point]]
    return [mean(values) for values in zip(*points, strict=True)]


def is_better(one: Sequence[float], other: Sequence[float], signs: Sequence[int]) -> bool:
    """Whether one is better in every metric."""
    return all(sign * a > sign * b for a, b, sign in zip(one, other, signs, strict=True))


class Worker:
    """Runs trials of a search, one after the other, until there are none."""

    def __init__(self, trials: Trials, *, processes: int = 1):
        self.trials = trials
        self.search = trials.search
        self.processes = processes
        evaluation = instantiate(self.search.config.evaluation) if SCORE in self.search.metrics else None
        self.score: Callable[[Mapping[str, Any]], float] | None = evaluation and evaluation.score

    def __call__(self) -> None:
        torch.set_num_threads(self.search.threads)
        while True:
            with self.trials.next_trial() as trial:
                if trial is None:
                    return
                settings = self.trials.settings(trial.params)
                said = ", ".join(f"{key}={value}" for key, value in settings.items())
                about = f"{self.search.name}, trial {trial.number} of {self.search.trials}"
                print("; ".join(filter(None, [f"{about}: {said}", self._time_left()])), flush=True)
                self._run(trial, settings)

    def _run(self, trial: "optuna.Trial", settings: Mapping[str, Any]) -> None:
        since, why, values = time.perf_counter(), "", None
        jobs: list[Job] = []
        try:
            jobs = self._jobs(trial.number, settings)
            for k, job in enumerate(jobs):
                self._run_job(trial, k, job, is_last=k == len(jobs) - 1)
            values = running_mean(trial.user_attrs["curve"], f"{len(jobs) - 1}/{END}")
        except Pruned:
            why = "most trials were better at the same point"
        except (Refused, NonFiniteError) as error:
            why = str(error)
        for job in jobs if values is None else ():
            drop_checkpoints(job)
        trial.set_user_attr("seconds", time.perf_counter() - since)
        self.trials.tell(trial, values, why=why)

    def _run_job(self, trial: "optuna.Trial", k: int, job: Job, *, is_last: bool) -> None:
        def look(at: object, metrics: Mapping[str, Any], *, may_prune: bool = True) -> None:
            values = [metric_of(metrics, name, where=job.folder) for name in self.search.metrics]
            self.trials.keep(trial, f"{k}/{at}", values)
            if may_prune and self.trials.is_beaten(trial, f"{k}/{at}"):
                raise Pruned

        metrics = finish(job, watch=lambda row: look(row["step"], row))
        look(END, self._scored(metrics), may_prune=not is_last)

    def _scored(self, metrics: Mapping[str, Any]) -> Mapping[str, Any]:
        """With the score; without it for a subject that cannot be judged."""
        try:
            return metrics if self.score is None else {**metrics, SCORE: self.score(metrics)}
        except KeyError:
            return metrics

    def _jobs(self, number: int, settings: Mapping[str, Any]) -> list[Job]:
        """The runs of a trial. Raises Refused if the settings, and not the machine, are at fault."""
        try:
            jobs = self.search.jobs(trial_name(number), overrides_of(settings))
            validate(jobs[0].config, run_folder=jobs[0].begun)
        except UserError as error:
            validate(self.search.config)
            raise Refused(str(error)) from error
        return jobs

    def _time_left(self) -> str:
        taken = [result.seconds for result in self.trials.results() if result.state != "unfinished"]
        left = max(1, self.search.trials - len(taken))  # one, where no more are to begin than have ended
        if not taken:
            return ""
        return f"about {duration(mean(taken) * left / min(self.processes, left))} left"
