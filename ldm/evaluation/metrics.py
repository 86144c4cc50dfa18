"""Metrics of a model's samples, from the judge's readings: fidelity, class drift, diversity, class shift.

A reading is {attribute: index of the predicted value [N]}, as `Judge.read` returns it.
"""

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

Reading = Mapping[str, Tensor]

MOST_DRAWN = 1_000_000  # numbers of the resamples that are in memory at a time


class Interval(NamedTuple):
    low: float
    high: float


def majority(reading: Reading) -> dict[str, int]:
    """The most frequent value of each attribute, which identifies the subject."""
    return {name: int(values.mode().values) for name, values in reading.items()}


def matches(reading: Reading, wanted: Mapping[str, int]) -> Tensor:
    """Whether each image shows each wanted value -> [N, number of wanted attributes] bool."""
    return torch.stack([reading[name] == value for name, value in wanted.items()], dim=1)


def subject_fidelity(reading: Reading, subject: Mapping[str, int]) -> Tensor:
    """Share of the subject's attributes that each image shows -> [N] float32. Higher is better."""
    return matches(reading, subject).float().mean(1)


def carries_subject(reading: Reading, subject: Mapping[str, int]) -> Tensor:
    """1 where an image shows all of the subject's attributes, else 0 -> [N] float32.

    Among images of the class, the rise of its mean over the base's is the class drift.
    """
    return matches(reading, subject).all(1).float()


def diversity(features: Tensor) -> float:
    """Mean Euclidean distance between the features of two images. features: [N, D] with N >= 2."""
    if len(features) < 2:
        raise ValueError("diversity needs two images or more")
    return float(torch.pdist(features.float()).mean())


def total_variation(one: Reading, other: Reading) -> dict[str, float]:
    """Total variation distance of the value distributions, by attribute: 0 for equal, 1 for disjoint ones."""
    distances = {}
    for name in one:
        values = 1 + int(torch.cat([one[name], other[name]]).max())
        shares = [torch.bincount(seen[name], minlength=values) / len(seen[name]) for seen in (one, other)]
        distances[name] = float((shares[0] - shares[1]).abs().sum() / 2)
    return distances


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Fréchet distance of two sets of features, taken as Gaussians (Heusel et al. 2017, eq. 6).

    one: [N, D], other: [M, D], N, M >= 2. The trace of the square root of the covariances' product is the
    nuclear norm of the product of the centred features, which needs no matrix root.
    """
    means = [features.double().mean(0) for features in (one, other)]
    centred = [
        (features.double() - mean) / (len(features) - 1) ** 0.5
        for features, mean in zip((one, other), means, strict=True)
    ]
    spread = sum(rows.square().sum() for rows in centred)
    overlap = torch.linalg.matrix_norm(centred[0] @ centred[1].T, ord="nuc")
    return max(0.0, float((means[0] - means[1]).square().sum() + spread - 2 * overlap))


def bootstrap(samples: Tensor, *, resamples: int = 10_000, seed: int = 0) -> Interval:
    """95 % expanded percentile interval of the mean over the first axis. samples: [N] or [N, ...].

    Percentiles of resamples (Efron 1979) are too narrow for few rows, by sqrt((N - 1) / N) and because a
    normal stands in for Student's t. So further percentiles are taken (Hesterberg 2015, section 5.2).
    Rows must be independent: one row a seed where several prompts share their seeds.
    """
    rows = samples.double().flatten(1).mean(1) if samples.ndim > 1 else samples.double()
    n, generator = len(rows), torch.Generator().manual_seed(seed)
    at_a_time = max(1, MOST_DRAWN // n)
    means = [
        rows[torch.randint(n, (min(at_a_time, resamples - done), n), generator=generator)].mean(1)
        for done in range(0, resamples, at_a_time)
    ]
    tail = expanded_tail(n)
    low, high = torch.cat(means).quantile(rows.new_tensor([tail, 1 - tail])).tolist()
    return Interval(round(low, 4), round(high, 4))


def expanded_tail(n: int, *, tail: float = 0.025) -> float:
    """Share of the resamples beyond each end of the interval: Phi(-sqrt(n / (n - 1)) t(1 - tail, n - 1)).

    Hesterberg 2015, "What Teachers Should Know About the Bootstrap", section 5.2. Of one row it is 0.
    """
    return NormalDist().cdf(-((n / (n - 1)) ** 0.5) * _t_quantile(1 - tail, n - 1)) if n > 1 else 0.0


def _t_quantile(share: float, df: int) -> float:
    """The quantile of Student's t with `df` degrees of freedom, for a share above a half, by bisection."""
    low, high = 0.0, 1e6
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, df) < share else (low, middle)
    return (low + high) / 2


def _t_cdf(t: float, df: int) -> float:
    """P(T <= t) of Student's t, as a finite sum (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / df**0.5)
    term = math.cos(angle) if df % 2 else 1.0
    total = 0.0
    for k in range(1 + df % 2, df, 2):
        total += term
        term *= math.cos(angle) ** 2 * k / (k + 1)
    central = (angle + math.sin(angle) * total) * 2 / math.pi if df % 2 else math.sin(angle) * total
    return (1 + central) / 2
