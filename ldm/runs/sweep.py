"""A study: the same job for every variant of a config, every subject and every seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ldm.errors import UserError
from ldm.runs.grid import Grid, Job, better_of, check_slugs

METRICS = ("subject_fidelity", "prompt_fidelity", "class_drift", "diversity_ratio")


def rows_of(variant: str, metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The metrics of a run by the name of their rows: its variant's, and one for each of `evaluate_also`."""
    also = metrics.get("evaluate_also", {})
    return {variant: metrics, **{f"{variant}, {sampling}": found for sampling, found in also.items()}}


@dataclass(frozen=True, kw_only=True)
class Sweep(Grid):
    """A file in configs/studies.

    variants: overrides of each; claim: what the paper or others say; finding: what the metrics show; made_at:
    commit and machine of its runs; metrics: columns of the table; frontier: two of them, plotted against each
    other; baseline: the variant that the others are compared with, by default the first; pictures: one of the
    samples' prompts, whose images are shown side by side.
    """

    KIND: ClassVar[str] = "study"

    claim: str
    variants: Mapping[str, Sequence[str]]
    finding: str = ""
    made_at: str = ""
    metrics: Sequence[str] = METRICS
    frontier: Sequence[str] = ()
    baseline: str = ""
    pictures: str = ""

    def check(self, path: str | Path) -> None:
        """Raises UserError for what does not fit together."""
        super().check(path)
        check_slugs("variants", self.variants, path)
        if self.baseline and self.baseline not in self.variants:
            remedy = f"Choose one of {', '.join(self.variants)}."
            raise UserError(f"The baseline `{self.baseline}` is not a variant", where=path, remedy=remedy)


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
        for name in (*sweep.metrics, *sweep.frontier):
            if not job.config.evaluation or (known and name not in known):
                remedy = f"It has {', '.join(known) or 'none'}."
                what = f"The evaluation of `{job.variant}` has no metric `{name}`"
                raise UserError(what, where=sweep.name, remedy=remedy)
    return found
