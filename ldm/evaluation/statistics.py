"""Means over subjects and paired differences, with bootstrap intervals over subjects.

Runs of one subject share its photos, and seeds are few, so subjects are what is resampled: an interval is
of the mean over subjects such as these. Differences are first taken between runs of one subject and seed.
"""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple

import torch

from ldm.evaluation.metrics import Interval, bootstrap

Row = Mapping[str, Any]  # variant, subject, seed, then one number per metric, None where there is none

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
    """The mean of a metric over the subjects of a variant that have it."""
    return _estimate([(row["subject"], row[metric]) for row in rows if row["variant"] == variant])


def paired_difference(rows: Sequence[Row], variant: str, baseline: str, metric: str) -> Estimate:
    """The mean of `variant` - `baseline` over subjects, between runs of the same subject and seed.

    Raises ValueError if one of them has no partner in the baseline, which may have more.
    """
    values = {
        name: {(row["subject"], row["seed"]): row[metric] for row in rows if row["variant"] == name}
        for name in (variant, baseline)
    }
    others = values[baseline]
    if not values[variant].keys() <= others.keys():
        raise ValueError(f"{baseline} was not run on all subjects and seeds of {variant}")
    pairs = [(run[0], value, others[run]) for run, value in values[variant].items()]
    return _estimate([(s, None if None in (a, b) else a - b) for s, a, b in pairs])


def _estimate(values: Sequence[tuple[str, float | None]]) -> Estimate:
    """(subject, value) of runs -> the mean over subjects of their means."""
    values = [(subject, value) for subject, value in values if value is not None]
    subjects = dict.fromkeys(subject for subject, _ in values)
    by_subject = {name: mean(value for subject, value in values if subject == name) for name in subjects}
    found = torch.tensor(list(by_subject.values()), dtype=torch.float64)
    enough = len(found) >= MIN_SUBJECTS
    interval = bootstrap(found) if enough else None
    return Estimate(float(found.mean()), interval, by_subject)
