"""The figures against hand-counted readings and closed forms."""

from statistics import NormalDist

import pytest
import torch

from ldm.evaluation import metrics
from ldm.evaluation.metrics import (
    bootstrap,
    carries_subject,
    diversity,
    expanded_tail,
    frechet_distance,
    majority,
    matches,
    subject_fidelity,
    total_variation,
)

READING = {  # four pictures
    "color": torch.tensor([1, 1, 2, 1]),
    "pattern": torch.tensor([0, 2, 0, 0]),
    "band": torch.tensor([3, 3, 3, 0]),
}
SUBJECT = {"color": 1, "pattern": 0, "band": 3}


def test_majority_is_what_most_pictures_show():
    assert majority(READING) == SUBJECT


def test_fidelity_is_the_share_of_attributes_shown():
    torch.testing.assert_close(subject_fidelity(READING, SUBJECT), torch.tensor([3, 2, 2, 2]) / 3)


def test_only_the_wanted_attributes_count():
    torch.testing.assert_close(subject_fidelity(READING, {"color": 1}), torch.tensor([1.0, 1, 0, 1]))


def test_a_picture_carries_the_subject_only_with_all_attributes():
    torch.testing.assert_close(carries_subject(READING, SUBJECT), torch.tensor([1.0, 0, 0, 0]))
    assert matches(READING, SUBJECT).shape == (4, 3)


def test_diversity_is_the_mean_distance_over_pairs():
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 8.0]])
    assert diversity(features) == pytest.approx((5 + 8 + 5) / 3)


def test_diversity_needs_a_pair():
    with pytest.raises(ValueError, match="two images"):
        diversity(torch.zeros(1, 3))


def test_bootstrap_matches_the_normal_interval_of_a_mean():
    values = torch.randn(400, generator=torch.Generator().manual_seed(1)) + 2
    low, high = bootstrap(values)
    half = 1.96 * values.std() / 400**0.5
    assert low == pytest.approx(float(values.mean() - half), abs=0.02)
    assert high == pytest.approx(float(values.mean() + half), abs=0.02)


def test_bootstrap_resamples_rows_not_single_values():
    """Two seeds that differ, each with equal prompts: as many prompts as one likes narrow nothing."""
    rows = torch.tensor([[0.0] * 50, [1.0] * 50])
    assert bootstrap(rows) == (0.0, 1.0)


@pytest.mark.parametrize(("n", "t"), [(2, 12.7062), (3, 4.30265), (6, 2.57058), (12, 2.20099), (31, 2.04227)])
def test_the_tail_is_that_of_students_t(n: int, t: float):
    """Against the printed quantiles of t at 0.975; for many rows it is the percentile interval's."""
    assert expanded_tail(n) == pytest.approx(NormalDist().cdf(-t * (n / (n - 1)) ** 0.5), rel=1e-3)
    assert expanded_tail(2000) == pytest.approx(0.025, rel=0.005)


@pytest.mark.parametrize(("n", "least"), [(6, 0.90), (12, 0.93)])
def test_few_rows_are_covered_better_than_by_percentiles(n: int, least: float):
    """Of intervals of the mean of n normal numbers, how many hold the true one; percentiles: 85 and 92 %."""
    generator = torch.Generator().manual_seed(n)
    studies = torch.randn(1000, n, generator=generator)
    held = [low <= 0 <= high for low, high in (bootstrap(values, resamples=1000) for values in studies)]
    means = studies[:, torch.randint(n, (1000, n), generator=generator)].mean(2)
    low, high = means.quantile(torch.tensor([0.025, 0.975]), dim=1)
    expanded, percentile = sum(held) / 1000, float(((low <= 0) & (high >= 0)).float().mean())
    assert expanded > least and abs(expanded - 0.95) < abs(percentile - 0.95) - 0.01


def test_more_rows_than_fit_at_a_time_make_the_same_interval(monkeypatch: pytest.MonkeyPatch):
    values = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    whole = bootstrap(values, resamples=500)
    monkeypatch.setattr(metrics, "MOST_DRAWN", 64)
    assert bootstrap(values, resamples=500) == whole


def test_total_variation_by_hand():
    one = {"color": torch.tensor([0, 0, 1, 2])}
    other = {"color": torch.tensor([0, 1, 1, 1, 1, 1, 1, 3])}
    assert total_variation(one, other) == {"color": pytest.approx(0.5 * (3 / 8 + 4 / 8 + 2 / 8 + 1 / 8))}
    assert total_variation(one, one) == {"color": 0}


def test_frechet_distance_of_gaussians_has_its_closed_form():
    """Axis-aligned: the squared distance of the means and of the standard deviations."""
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3).double()
    scale, moved, wider = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.0, -1.0], [2.0, 1.0, 3.0]]).double()
    std = corners[:, 0].std()
    wanted = moved.square().sum() + (std * (wider - scale)).square().sum()
    distance = frechet_distance(corners * scale, corners * wider + moved)
    assert distance == pytest.approx(float(wanted), rel=1e-9)


def test_frechet_distance_equals_the_matrix_root():
    one, other = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).double().split(20)
    other = other @ torch.randn(5, 5, generator=torch.Generator().manual_seed(1)).double() + 0.3
    roots = torch.linalg.eigvals(torch.cov(one.T) @ torch.cov(other.T)).real.clamp(min=0).sqrt()
    spread = torch.cov(one.T).trace() + torch.cov(other.T).trace()
    wanted = (one.mean(0) - other.mean(0)).square().sum() + spread - 2 * roots.sum()
    assert frechet_distance(one, other) == pytest.approx(float(wanted), rel=1e-9)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-12)
