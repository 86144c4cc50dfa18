"""The figures against hand-counted readings and closed forms."""

import pytest
import torch

from ldm.evaluation.metrics import (
    bootstrap,
    carries_subject,
    diversity,
    majority,
    matches,
    subject_fidelity,
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
    with pytest.raises(ValueError, match="two pictures"):
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
