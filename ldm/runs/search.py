"""A search: ranges of config keys, tried on several subjects and seeds for the best score or a front.

What a search is and its checks stand here; its trials and their storage in `trials`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from omegaconf import OmegaConf

from ldm.annotations import NonNegativeInt, PositiveInt, Seed
from ldm.config import get_class
from ldm.errors import UserError
from ldm.runs.grid import Grid, Job, better_of
from ldm.runs.prompts import sample_rows
from ldm.runs.validate import validate
from ldm.schema import RunConfig

Kind = Literal["float", "log", "int", "choice"]
SCORE = "score"
FORM = "Write float, log or int with its [lowest, highest], or choice with a list."
OF_RUN = (
    "name",
    "seed",
    "data.params.subject_root",
    "data.params.class_word",
    "data.params.concepts",
)  # the search sets them


@dataclass(frozen=True)
class Range:
    """What a key may be: numbers from `low` to `high`, which are both possible, or one of `choices`.

    step: between two numbers that are tried, for float and int.
    """

    kind: Kind
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    choices: Sequence[Any] = ()

    @classmethod
    def parse(cls, given: Any) -> "Range":
        """ "{log: [1e-5, 1e-3]}", "{int: [100, 400], step: 50}", "{choice: [a, b]}". Raises UserError."""
        kinds = [kind for kind in get_args(Kind) if isinstance(given, dict) and kind in given]
        if len(kinds) != 1 or given.keys() - {*kinds, "step"}:
            raise UserError(f"{given!r} is not a range", remedy=FORM)
        kind, values = kinds[0], given[kinds[0]]
        if not isinstance(values, list):
            raise UserError(f"{values!r} is not a list", remedy=FORM)
        if kind == "choice":
            return cls(kind, choices=_choices(values, given))
        numbers = [_number(value, kind) for value in values]
        if len(numbers) != 2 or not numbers[0] < numbers[1]:
            raise UserError(f"The range {values} is empty", remedy=FORM)
        if kind == "log" and (numbers[0] <= 0 or "step" in given):
            remedy = "Begin it above 0, and without a step."
            raise UserError(f"{given} is no range of logarithms", remedy=remedy)
        return cls(kind, *numbers, step=_step(given["step"], kind, *numbers) if "step" in given else None)

    @property
    def ends(self) -> list[Any]:
        """The values that all others lie between, or all that there are."""
        return list(self.choices) if self.kind == "choice" else [self.low, self.high]

    def holds(self, value: Any) -> bool:
        """Whether a value is one that may be tried."""
        if self.kind == "choice":
            return any(value == choice and type(value) is type(choice) for choice in self.choices)
        if isinstance(value, bool) or not isinstance(value, int if self.kind == "int" else int | float):
            return False
        steps = (value - self.low) / self.step if self.step else 0.0
        return self.low <= value <= self.high and abs(steps - round(steps)) < 1e-9

    def rounded(self, value: Any) -> Any:
        """A value with four digits, which are enough to tell settings apart, still inside the range."""
        if self.kind not in ("float", "log"):
            return value
        return min(max(float(f"{value:.4g}"), self.low), self.high)


def _choices(values: list[Any], given: Mapping[str, Any]) -> list[Any]:
    if "step" in given:
        raise UserError("A choice has no step", remedy="Take it off.")
    odd = [value for value in values if not isinstance(value, bool | int | float | str | None)]
    if odd:
        raise UserError(f"{odd[0]!r} cannot be a choice", remedy="Give numbers, texts, true, false or null.")
    if len({json.dumps(value) for value in values}) < max(2, len(values)):
        raise UserError(f"The choice {values} is empty", remedy="Give two different values or more.")
    return values


def _number(value: Any, kind: Kind) -> float:
    """A number of YAML, in which 1e-4 without a point is a text."""
    try:
        number = value if isinstance(value, int) and not isinstance(value, bool) else float(value)
        if isinstance(value, bool) or not math.isfinite(number):
            raise ValueError
    except (TypeError, ValueError) as error:
        raise UserError(f"{value!r} is not a number", remedy=FORM) from error
    if kind == "int" and not isinstance(number, int):
        raise UserError(f"{value!r} is not a whole number", remedy="Write float, or whole numbers.")
    return number if kind == "int" else float(number)


def _step(value: Any, kind: Kind, low: float, high: float) -> float:
    step = _number(value, kind)
    if step <= 0 or abs((high - low) / step - round((high - low) / step)) > 1e-9:
        what = f"Steps of {step} do not lead from {low} to {high}"
        raise UserError(what, remedy="Choose a step that divides the range.")
    return step


@dataclass(frozen=True, kw_only=True)
class Search(Grid):
    """A search's YAML file, and the configs that it starts from.

    keys: dotted key -> its range; trials: how many settings are tried; metrics: the score, or one or two
    metrics of the evaluation, each the mean over subjects and seeds; prune_after: finished trials that a
    trial is compared with before it may end early, 0: none does; random_seed: of the settings; pictures: one
    of the samples' prompts, whose images the page shows, by default the first.
    """

    KIND: ClassVar[str] = "search"

    keys: Mapping[str, Mapping[str, Any]]
    trials: PositiveInt
    metrics: Sequence[str] = (SCORE,)
    prune_after: NonNegativeInt = 5
    random_seed: Seed = 0
    pictures: str = ""

    def check(self, path: str | Path) -> None:
        """Raises UserError for what is wrong by itself; `check_search` reads the configs too."""
        super().check(path)
        overrides = {item.partition("=")[0].strip() for item in self.set}
        for key, given in self.keys.items():
            if key in OF_RUN or key in overrides:
                by = "the search gives it to each run" if key in OF_RUN else "`set` sets it"
                raise UserError(f"`{key}` cannot be searched: {by}", where=path, remedy="Take it off.")
            try:
                Range.parse(given)
            except UserError as error:
                raise UserError(error.what, where=f"{path}, {key}", remedy=error.remedy) from error
        if not 1 <= len(set(self.metrics)) == len(self.metrics) <= 2:
            remedy = "Give one metric, or two for a front."
            raise UserError(f"A search has no metrics {list(self.metrics)}", where=path, remedy=remedy)

    @cached_property
    def ranges(self) -> dict[str, Range]:
        return {key: Range.parse(given) for key, given in self.keys.items()}

    @cached_property
    def config(self) -> RunConfig:
        """The config that the search starts from, on its first subject."""
        return self.first_job("base", ()).config

    @cached_property
    def picture_rows(self) -> dict[str, dict[str, int]]:
        """Subject -> its prompts of `pictures`, several for a run of several -> their rows of samples."""
        configs = {subject: self.job("base", subject, self.seeds[0], ()).config for subject in self.subjects}
        template = self.pictures or next(iter(self.config.samples.prompts), "")
        return {subject: sample_rows(config, template) for subject, config in configs.items()}

    def first_job(self, variant: str, overrides: Sequence[str]) -> Job:
        return self.job(variant, next(iter(self.subjects)), self.seeds[0], overrides)

    def base_values(self) -> dict[str, Any] | None:
        """The config's own value of each key; None if one of them lies outside of its range."""
        content = OmegaConf.create(self.config.container)
        values = {key: OmegaConf.select(content, key) for key in self.ranges}
        return values if all(self.ranges[key].holds(value) for key, value in values.items()) else None

    def signs(self) -> list[int]:
        """1 for each metric that is better higher, -1 for one that is better lower."""
        better = {SCORE: "higher", **better_of(self.config)}
        return [1 if better[name] == "higher" else -1 for name in self.metrics]


def overrides_of(settings: Mapping[str, Any]) -> list[str]:
    """Dotted key -> value, as words of a command line."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def check_search(search: Search) -> None:
    """Raises UserError for whatever a run would be refused for at the ends of the ranges; nothing is run."""
    evaluation = search.config.evaluation
    if not evaluation:
        raise UserError("A search needs an `evaluation`", where="evaluation", remedy="Add one to the config.")
    known = [SCORE, *better_of(search.config)]
    for name in search.metrics:
        if name not in known:
            what = f"{get_class(evaluation['target']).__name__} has no metric `{name}`"
            raise UserError(what, where=search.name, remedy=f"It has {', '.join(known)}.")
    prompts = search.config.samples.prompts
    if search.pictures and search.pictures not in prompts:
        remedy = f"Choose one of {', '.join(prompts)}."
        raise UserError(f"`{search.pictures}` is not sampled", where=search.name, remedy=remedy)
    for subject in search.subjects:
        validate(search.job("base", subject, search.seeds[0], ()).config)
    for key, own in search.ranges.items():
        for value in own.ends:
            try:
                validate(search.first_job("base", overrides_of({key: value})).config)
            except UserError as error:
                what = f"`{key}` cannot be {value!r}: {error}"
                raise UserError(what, where=f"{search.name}, {key}", remedy="Narrow its range.") from error
