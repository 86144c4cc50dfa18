"""Means and paired differences over subjects, on made-up rows whose answers are known."""

import pytest
import torch

from ldm.evaluation.statistics import MIN_SUBJECTS, mean_of, paired_difference


def rows(variant: str, values: dict[tuple[str, int], float]) -> list[dict]:
    return [
        {"variant": variant, "subject": subject, "seed": seed, "m": value}
        for (subject, seed), value in values.items()
    ]


def test_subjects_weigh_alike_however_many_seeds_they_have():
    found = mean_of(rows("a", {("x", 1): 0.0, ("x", 2): 0.2, ("x", 3): 0.4, ("y", 1): 1.0}), "a", "m")
    assert found.by_subject == pytest.approx({"x": 0.2, "y": 1.0}) and found.mean == pytest.approx(0.6)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 12])
def test_few_subjects_get_no_interval(count: int):
    found = mean_of(rows("a", {(f"s{k}", 1): k / 10 for k in range(count)}), "a", "m")
    assert (found.interval is None) == (count < MIN_SUBJECTS) and len(found.by_subject) == count
    assert not found.excludes_zero or count >= MIN_SUBJECTS


def test_pairing_takes_the_subjects_own_level_away():
    """Subjects far apart, each moved by the same: alone the means say nothing, their difference is exact."""
    levels = {(f"s{k}", seed): 10.0 * k + seed for k in range(6) for seed in (1, 2)}
    both = rows("a", levels) + rows("b", {run: value + 0.25 for run, value in levels.items()})
    difference = paired_difference(both, "b", "a", "m")
    assert difference.mean == pytest.approx(0.25)
    assert difference.interval == pytest.approx((0.25, 0.25)) and difference.excludes_zero
    alone = mean_of(both, "a", "m").interval
    assert alone.high - alone.low > 10


def test_an_interval_covers_what_it_should():
    """Of 200 studies of 12 subjects without an effect, about 5 % find one."""
    generator = torch.Generator().manual_seed(0)
    found = 0
    for _ in range(200):
        effects = torch.randn(12, generator=generator).tolist()
        both = rows("a", {(f"s{k}", 1): 0.0 for k in range(12)})
        both += rows("b", {(f"s{k}", 1): effect for k, effect in enumerate(effects)})
        found += paired_difference(both, "b", "a", "m").excludes_zero
    assert 0.03 < found / 200 < 0.09


def test_a_run_without_its_partner_is_refused():
    both = rows("a", {("x", 1): 0.0}) + rows("b", {("x", 2): 0.0})
    with pytest.raises(ValueError, match="a was not run on all subjects and seeds of b"):
        paired_difference(both, "b", "a", "m")


def test_a_baseline_may_have_more_runs_and_a_run_no_value():
    both = rows("a", {("x", 1): 1.0, ("y", 1): 9.0, ("z", 1): 2.0})
    both += rows("b", {("x", 1): 1.5, ("z", 1): None})
    assert paired_difference(both, "b", "a", "m").by_subject == {"x": 0.5}
    assert mean_of(both, "b", "m").mean == 1.5
