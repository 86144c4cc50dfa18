"""The figures against hand-counted readings and closed forms."""

import pytest
import torch

from ldm.evaluation.metrics import (
    bootstrap,
    carries_subject,
    diversity,
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
    low, high = bootstrap(values, lambda rows: float(rows.mean()))
    half = 1.96 * values.std() / 400**0.5
    assert low == pytest.approx(float(values.mean() - half), abs=0.02)
    assert high == pytest.approx(float(values.mean() + half), abs=0.02)


def test_bootstrap_resamples_rows_not_single_values():
    """Two seeds that differ, each with equal prompts: as many prompts as one likes narrow nothing."""
    rows = torch.tensor([[0.0] * 50, [1.0] * 50])
    assert bootstrap(rows, lambda r: float(r.mean())) == (0.0, 1.0)


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
