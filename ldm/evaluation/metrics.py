"""Metrics of a model's samples, from the judge's readings: fidelity, class drift, diversity, class shift.

A reading is {attribute: index of the predicted value [N]}, as `Judge.read` returns it.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Reading = Mapping[str, Tensor]


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


def bootstrap(
    samples: Tensor, statistic: Callable[[Tensor], float], *, resamples: int = 1000, seed: int = 0
) -> Interval:
    """95 % percentile interval of `statistic` over resamples of the first axis (Efron 1979).

    Rows must be independent: one row a seed where several prompts share their seeds.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(len(samples), (len(samples),), generator=generator) for _ in range(resamples))
    values = torch.tensor([statistic(samples[rows]) for rows in draws])
    low, high = values.quantile(torch.tensor([0.025, 0.975])).tolist()
    return Interval(round(low, 4), round(high, 4))
