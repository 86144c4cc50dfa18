"""Means over subjects and paired differences, with bootstrap intervals over subjects.

Runs of one subject share its photos, and seeds are few, so subjects are what is resampled: an interval says
what to expect of another subject. Differences are first taken between runs of the same subject and seed.
"""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple

import torch

from ldm.evaluation.metrics import Interval, bootstrap

Row = Mapping[str, Any]  # variant, subject, seed, then one number per metric

MIN_SUBJECTS = 5  # the resamples of fewer lie inside of their values, too close together


class Estimate(NamedTuple):
    """A mean over subjects, with its 95 % interval over them, or None for fewer than MIN_SUBJECTS."""

    mean: float
    interval: Interval | None
    by_subject: Mapping[str, float]  # each the mean over its seeds

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval, if there is one, lies on one side of 0."""
        return self.interval is not None and (self.interval.low > 0 or self.interval.high < 0)


def mean_of(rows: Sequence[Row], variant: str, metric: str) -> Estimate:
    """The mean of a metric over the subjects of a variant."""
    return _estimate([(row["subject"], row[metric]) for row in rows if row["variant"] == variant])


def paired_difference(rows: Sequence[Row], variant: str, baseline: str, metric: str) -> Estimate:
    """The mean of `variant` - `baseline` over subjects, between runs of the same subject and seed.

    Raises ValueError if a run of one has no partner in the other.
    """
    values = {
        name: {(row["subject"], row["seed"]): row[metric] for row in rows if row["variant"] == name}
        for name in (variant, baseline)
    }
    if values[variant].keys() != values[baseline].keys():
        raise ValueError(f"{variant} and {baseline} were not run on the same subjects and seeds")
    others = values[baseline]
    return _estimate([(run[0], value - others[run]) for run, value in values[variant].items()])


def _estimate(values: Sequence[tuple[str, float]]) -> Estimate:
    """(subject, value) of runs -> the mean over subjects of their means."""
    subjects = dict.fromkeys(subject for subject, _ in values)
    by_subject = {name: mean(value for subject, value in values if subject == name) for name in subjects}
    found = torch.tensor(list(by_subject.values()), dtype=torch.float64)
    enough = len(found) >= MIN_SUBJECTS
    interval = bootstrap(found) if enough else None
    return Estimate(float(found.mean()), interval, by_subject)
