"""A study: the same job for every variant of a config, every subject and every seed."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any, TypedDict

import yaml

from ldm.errors import UserError
from ldm.storybook.subjects import new_subject, write_subject
from ldm.storybook.world import CLASSES
from ldm.training.options import parse
from ldm.training.schema import RunConfig

METRICS = ("subject_fidelity", "prompt_fidelity", "class_drift", "diversity_ratio")


def rows_of(variant: str, metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The metrics of a run by the name of their rows: its variant's, and one for each of `evaluate_also`."""
    also = metrics.get("evaluate_also", {})
    return {variant: metrics, **{f"{variant}, {sampling}": found for sampling, found in also.items()}}


class Subject(TypedDict, total=False):
    """`class_word`, and either the folder `photos` or the `seed` of a storybook subject."""

    class_word: str
    photos: str
    seed: int


@dataclass(frozen=True)
class Sweep:
    """A file in configs/studies.

    base: configs to merge; set: overrides of all runs; variants: overrides of each; claim: what the paper or
    others say; finding: what the metrics show; made_at: commit and machine of its runs; metrics: columns of
    the table; frontier: two of them, plotted against each other; baseline: the variant that the others are
    compared with, by default the first; pictures: one of the samples' prompts, whose images are shown side by
    side; threads: of a run on the CPU, whose sums depend on their number.
    """

    name: str
    title: str
    claim: str
    base: Sequence[str]
    variants: Mapping[str, Sequence[str]]
    subjects: Mapping[str, Subject]
    seeds: Sequence[int]
    finding: str = ""
    made_at: str = ""
    set: Sequence[str] = ()
    metrics: Sequence[str] = METRICS
    frontier: Sequence[str] = ()
    baseline: str = ""
    pictures: str = ""
    threads: int = 1


def baselines_of(sweep: Sweep, rows: Sequence[str]) -> dict[str, str]:
    """Row of the table -> the baseline's row under the same sampling, for the rows of all other variants."""
    baseline = sweep.baseline or next(iter(sweep.variants))
    longest_first = sorted(sweep.variants, key=len, reverse=True)
    found = {}
    for row in rows:
        variant = next(name for name in longest_first if row == name or row.startswith(f"{name}, "))
        if variant != baseline:
            found[row] = baseline + row.removeprefix(variant)
    return found


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


def read_sweep(path: str | Path) -> Sweep:
    """A study's YAML file -> the study. Raises UserError for what is missing, unknown or of another type."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError("The study cannot be read", where=path, remedy="Give a YAML file.") from error
    known = {f.name: f.default for f in fields(Sweep) if f.name != "name"}
    if not isinstance(content, dict):
        raise UserError("The file is not a study", where=path, remedy=f"It has the keys {', '.join(known)}.")
    for key in content:
        if key not in known:
            raise UserError(f"`{key}` is not a key of a study", where=path, remedy=f"Use {', '.join(known)}.")
    for key in ("title", "claim", "base", "variants", "subjects", "seeds"):
        if not content.get(key):
            raise UserError(f"`{key}` is missing or empty", where=path, remedy="Every study needs it.")
    sweep = Sweep(name=Path(path).stem, **content)
    _check(sweep, path)
    return sweep


def jobs_of(sweep: Sweep) -> list[Job]:
    """Every run of the study with its checked config; writes the photos of storybook subjects."""
    photos = {name: _photos(sweep, name, subject) for name, subject in sweep.subjects.items()}
    found = []
    for variant, subject, seed in product(sweep.variants, sweep.subjects, sweep.seeds):
        name = f"study-{sweep.name}/{slug(variant)}--{slug(subject)}--{seed}"
        class_word = sweep.subjects[subject]["class_word"]
        words = [f"--name={name}", f"--seed={seed}"]
        words += [f"--data_root={photos[subject]}", f"--class_word={class_word}"]
        words += [*sweep.set, *sweep.variants[variant]]
        try:
            config = parse(["--base", *sweep.base, *words])
        except UserError as error:
            raise UserError(f"The variant `{variant}` is not a config: {error}", where=sweep.name) from error
        found.append(Job(variant, subject, seed, config))
    return found


def same_run(one: RunConfig, other: RunConfig) -> bool:
    """Whether runs of two studies are the same run: configs that differ in the study's name alone."""
    contents = [config.container for config in (one, other)]
    for content in contents:
        sweep = Path(content.pop("name")).parts[0]  # storybook subjects are in its folder
        params = content["data"]["params"]
        params["subject_root"] = str(params["subject_root"]).replace(f"logs/{sweep}/", "logs/")
    return contents[0] == contents[1]


def shard_jobs(jobs: Sequence[Job], part: str) -> Sequence[Job]:
    """ "2/3" is every third job from the second on: a share for each of three processes or machines."""
    numbers = re.fullmatch(r"(\d+)/(\d+)", part)
    k, n = map(int, numbers.groups()) if numbers else (0, 0)
    if not 1 <= k <= n:
        raise UserError(f"`{part}` is not a part", where="--part", remedy="Write 1/2 and 2/2, for example.")
    return jobs[k - 1 :: n]


def slug(text: str) -> str:
    """A name that any file system takes."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def _photos(sweep: Sweep, name: str, subject: Subject) -> str:
    if "photos" in subject:
        return subject["photos"]
    folder = Path("logs", f"study-{sweep.name}", "subjects", slug(name))
    write_subject(folder, new_subject(subject["class_word"], seed=subject["seed"]))
    return str(folder)


def _check(sweep: Sweep, path: str | Path) -> None:
    for name, subject in sweep.subjects.items():
        if "class_word" not in subject or ("photos" in subject) == ("seed" in subject):
            remedy = "Give it a class_word, and either a folder of photos or a seed."
            raise UserError(f"The subject `{name}` is not complete", where=path, remedy=remedy)
        if "seed" in subject and subject["class_word"] not in CLASSES:
            remedy = f"It draws {', '.join(CLASSES)}."
            raise UserError(f"The storybook has no `{subject['class_word']}`", where=path, remedy=remedy)
    if sweep.baseline and sweep.baseline not in sweep.variants:
        remedy = f"Choose one of {', '.join(sweep.variants)}."
        raise UserError(f"The baseline `{sweep.baseline}` is not a variant", where=path, remedy=remedy)
    for kind in ("variants", "subjects"):
        slugs: dict[str, Any] = {}
        for name in getattr(sweep, kind):
            if slug(name) in slugs:
                what = f"`{name}` and `{slugs[slug(name)]}` of {kind} would share a folder"
                raise UserError(what, where=path, remedy="Name them further apart.")
            slugs[slug(name)] = name
