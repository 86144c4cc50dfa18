"""A study: the same job for every variant of a config, every subject and every seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from ldm.annotations import PositiveInt
from ldm.errors import UserError
from ldm.reports.sweep_page import place_of
from ldm.runs.grid import Grid, Job, better_of, check_slugs
from ldm.schema import RunConfig

METRICS = ("subject_fidelity", "prompt_fidelity", "class_drift", "diversity_ratio")
OF_CURVES = ("step",)  # columns of a study that is read `at` a value, besides the evaluation's metrics


@dataclass(frozen=True, kw_only=True)
class Sweep(Grid):
    """A file in configs/studies.

    variants: overrides of each; claim: what the paper or others say; finding: what the metrics show; made_at:
    commit and machine of its runs; metrics: columns of the table; frontier: two of them, plotted against each
    other; baseline: the variant that the others are compared with, by default the first; baseline_sampling:
    in its place, of `evaluate_also`, that with which each variant's other samplings are compared; pictures:
    one of the samples' prompts, whose images are shown side by side; only: the subjects of a variant that is
    not for all; at: a metric and the values at which a run's curve is read, in place of its end; extracted:
    the ranks of the LoRAs that are extracted from the models of a variant, and measured too.
    """

    KIND: ClassVar[str] = "study"

    claim: str
    variants: Mapping[str, Sequence[str]]
    finding: str = ""
    made_at: str = ""
    metrics: Sequence[str] = METRICS
    frontier: Sequence[str] = ()
    baseline: str = ""
    baseline_sampling: str = ""
    pictures: str = ""
    only: Mapping[str, Sequence[str]] = field(default_factory=dict)
    at: Mapping[str, Sequence[float]] = field(default_factory=dict)
    extracted: Mapping[str, Sequence[PositiveInt]] = field(default_factory=dict)

    @property
    def groups(self) -> list[str]:
        """The subjects that are several, which one run learns."""
        return [name for name, subject in self.subjects.items() if "together" in subject]

    def check(self, path: str | Path) -> None:
        """Raises UserError for what does not fit together."""
        super().check(path)
        check_slugs("variants", self.variants, path)
        named = [("baseline", self.baseline)] if self.baseline else []
        named += [(key, name) for key in ("only", "extracted") for name in getattr(self, key)]
        for key, name in named:
            if name not in self.variants:
                remedy = f"Choose one of {', '.join(self.variants)}."
                raise UserError(f"`{name}` of `{key}` is not a variant", where=path, remedy=remedy)
        if self.baseline and self.baseline_sampling:
            what = "`baseline` and `baseline_sampling` are two answers to one question"
            raise UserError(what, where=path, remedy="Take one of them off.")
        for variant, subjects in self.only.items():
            for name in subjects or [""]:
                if name not in self.subjects:
                    remedy = f"Choose of {', '.join(self.subjects)}."
                    what = f"`{name}` of `only: {variant}` is not a subject"
                    raise UserError(what, where=path, remedy=remedy)
        wrong = len(self.at) > 1 or not all(self.at.values()) or self.at.keys() - set(self.metrics)
        if self.at and (wrong or self.groups):
            what = "A curve is read at values of one of `metrics`, and of single subjects"
            raise UserError(what, where=f"{path}: at", remedy="Write e.g. {subject_fidelity: [0.8]}.")
        if self.frontier and (len(self.frontier) != 2 or not set(self.frontier) <= set(self.metrics)):
            remedy = "Name two of the study's `metrics`, across and up."
            raise UserError(f"A frontier is not of {list(self.frontier)}", where=path, remedy=remedy)
        if self.extracted and (self.at or self.groups):
            what = "LoRAs are extracted from models of single subjects, and read at the end of a run"
            raise UserError(what, where=f"{path}: extracted", remedy="Take `at` or the groups off.")

    def jobs(self, variant: str, overrides: Sequence[str]) -> list[Job]:
        """The runs of a variant with their checked configs; writes the photos of storybook subjects."""
        subjects = self.only.get(variant, self.subjects)
        return [self.job(variant, subject, seed, overrides) for subject in subjects for seed in self.seeds]


def name_of_lora(variant: str, rank: int) -> str:
    """The row of the LoRAs that are extracted from a variant's models."""
    return f"{variant} as LoRA {rank}"


def baselines_of(sweep: Sweep, rows: Sequence[str]) -> dict[str, str]:
    """Row of the table -> the row that it is compared with.

    That is the baseline's under the same sampling, or its own variant's under `baseline_sampling`.
    """
    baseline = sweep.baseline or next(iter(sweep.variants))
    longest_first = sorted(sweep.variants, key=len, reverse=True)
    loras = {name_of_lora(variant, rank) for variant, ranks in sweep.extracted.items() for rank in ranks}
    found = {}
    for row in rows:
        if row in loras:
            found[row] = baseline
            continue
        variant = next(name for name in longest_first if row == name or row.startswith(f"{name}, "))
        how = row.removeprefix(variant)
        group = next((g for g in sweep.groups if how == f", {g}" or how.startswith(f", {g}, ")), None)
        together = "" if group is None else f", {group}"
        if sweep.baseline_sampling:
            found[row] = f"{variant}{together}, {sweep.baseline_sampling}"
        elif variant != baseline:
            found[row] = baseline + how.removeprefix(together)
    return {row: partner for row, partner in found.items() if row != partner}


def names_of_rows(sweep: Sweep, job: Job) -> list[str]:
    """The rows of a run in the table: of its samplings, or the places on its curve, and of its LoRAs."""
    if sweep.at:
        return [job.variant + place_of(value, values) for values in sweep.at.values() for value in values]
    name = f"{job.variant}, {job.subject}" if job.subject in sweep.groups else job.variant
    samplings = [name, *(f"{name}, {sampling}" for sampling in job.config.evaluate_also or {})]
    return samplings + [name_of_lora(job.variant, rank) for rank in sweep.extracted.get(job.variant, ())]


def check_partners(sweep: Sweep, jobs: Sequence[Job]) -> None:
    """Raises UserError for a row with subjects that the baseline's row, its partner, lacks."""
    found: dict[str, dict[str, None]] = {}
    for job in jobs:
        for row in names_of_rows(sweep, job):
            subjects = sweep.subjects[job.subject].get("together", [job.subject])
            found.setdefault(row, {}).update(dict.fromkeys(subjects))
    for row, baseline in baselines_of(sweep, list(found)).items():
        if lacking := [subject for subject in found[row] if subject not in found.get(baseline, {})]:
            what = f"`{row}` is compared with `{baseline}`, which has no runs of {', '.join(lacking)}"
            remedy = "Give the baseline the same subjects and `evaluate_also`, or name another baseline."
            raise UserError(what, where=sweep.name, remedy=remedy)


def read_sweep(path: str | Path) -> Sweep:
    """A study's YAML file -> the study. Raises UserError for what is missing, unknown or of another type."""
    return Sweep.read(path)


def jobs_of(sweep: Sweep) -> list[Job]:
    """Every run of the study with its checked config; writes the photos of storybook subjects."""
    found = []
    for variant, overrides in sweep.variants.items():
        try:
            found += sweep.jobs(variant, overrides)
        except UserError as error:
            raise UserError(f"The variant `{variant}` is not a config: {error}", where=sweep.name) from error
    for job in found:
        known = better_of(job.config)
        known = known and {**known, **dict.fromkeys(OF_CURVES if sweep.at else (), "lower")}
        for name in (*sweep.metrics, *sweep.frontier):
            if not job.config.evaluation or (known and name not in known):
                remedy = f"It has {', '.join(known) or 'none'}."
                what = f"The evaluation of `{job.variant}` has no metric `{name}`"
                raise UserError(what, where=sweep.name, remedy=remedy)
        if sweep.pictures and sweep.pictures not in job.config.samples.prompts:
            remedy = f"Choose one of {', '.join(job.config.samples.prompts)}."
            what = f"`{sweep.pictures}` is not sampled by `{job.variant}`"
            raise UserError(what, where=f"{sweep.name}: pictures", remedy=remedy)
        if sweep.at and not 0 < job.config.online_eval.every_steps <= job.config.trainer.max_steps:
            what = f"`{job.variant}` keeps no curve to read"
            remedy = "Set online_eval.every_steps, at most trainer.max_steps."
            raise UserError(what, where=f"{sweep.name}: at", remedy=remedy)
        if sweep.extracted.get(job.variant) and not is_full(job.config):
            what, remedy = f"`{job.variant}` is no full training from one base", "Name variants that are."
            raise UserError(what, where=f"{sweep.name}: extracted", remedy=remedy)
    check_partners(sweep, found)
    return found


def is_full(config: RunConfig) -> bool:
    """Whether a run trains the networks of one base, and no LoRA or adapter beside them."""
    trainable = config.model["params"].get("trainable") or {}
    return bool(config.base_checkpoint) and not (
        config.base_parts or trainable.get("lora") or trainable.get("adapter")
    )
