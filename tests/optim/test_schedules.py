"""Learning-rate schedules in closed form, and one of a user's own."""

from itertools import pairwise
from typing import get_args

import pytest

from ldm.config import check
from ldm.errors import UserError
from ldm.optim.optimizers import lr_factor
from ldm.optim.schedules import (
    REX,
    SHORT,
    WSD,
    Constant,
    Cosine,
    CosineRestarts,
    Linear,
    LRSchedule,
    Polynomial,
    ScheduleName,
    ScheduleNode,
    build_schedule,
)


def test_schedules_in_closed_form():
    cosine = Cosine(warmup_steps=10)
    assert [cosine(0, 110), cosine(9, 110)] == [0.1, 1.0]
    assert cosine(60, 110) == pytest.approx(0.5) and cosine(110, 110) == pytest.approx(0, abs=1e-12)
    assert Constant()(4, 5) == 1.0


def test_wsd_is_constant_and_then_linear_to_zero_over_the_last_fifth():
    wsd = WSD(warmup_steps=10)
    assert [wsd(step, 1000) for step in (4, 9, 10, 500, 800)] == [0.5, 1.0, 1.0, 1.0, 1.0]
    assert [wsd(step, 1000) for step in (850, 900, 1000)] == [0.75, 0.5, 0.0]
    assert all(wsd(step, 2000) == wsd(step, 1000) for step in range(801))
    assert WSD(decay=0.5)(750, 1000) == 0.5
    late = WSD(warmup_steps=90)  # the decay begins after it, and does not jump
    assert [late(step, 100) for step in (89, 90, 95, 100)] == [1.0, 1.0, 0.5, 0.0]


def test_straight_lines_and_powers_in_closed_form():
    """(1 - z)^p from the rate to its end, z of the steps after the warm-up."""
    linear = Linear(warmup_steps=10, end=0.1)
    assert [linear(step, 110) for step in (4, 10, 60, 110, 120)] == pytest.approx([0.5, 1, 0.55, 0.1, 0.1])
    cubic = Polynomial(power=3.0)
    assert [cubic(step, 100) for step in (0, 50, 90, 100)] == pytest.approx([1, 0.125, 0.001, 0])
    assert [Polynomial(power=1.0)(step, 9) for step in range(10)] == [Linear()(step, 9) for step in range(10)]


def test_restarts_begin_at_the_rate_again_and_end_at_zero():
    """Three half cosines of 100 steps after a warm-up of 10; a single cycle is the cosine."""
    restarts = CosineRestarts(warmup_steps=10, cycles=3)
    assert [restarts(step, 310) for step in (10, 110, 210)] == pytest.approx([1, 1, 1])
    assert [restarts(step, 310) for step in (60, 160, 260)] == pytest.approx([0.5] * 3)
    assert [restarts(step, 310) for step in (109, 209, 309)] == pytest.approx([0.000247] * 3, rel=1e-2)
    assert restarts(310, 310) == 0
    one, cosine = CosineRestarts(cycles=1), Cosine()
    assert [one(step, 30) for step in range(31)] == pytest.approx([cosine(step, 30) for step in range(31)])


def test_rex_is_a_reflected_exponential():
    """(1 - z) / (1/2 + (1 - z) / 2): 2/3 in the middle, above the straight line, steeper at the end."""
    rex = REX(warmup_steps=10)
    assert [rex(step, 110) for step in (4, 10, 60, 85, 110)] == pytest.approx([0.5, 1, 2 / 3, 0.4, 0])
    factors = [rex(step, 110) for step in range(10, 111)]
    falls = [a - b for a, b in pairwise(factors)]
    lines = [1 - k / 100 for k in range(1, 100)]
    assert falls == sorted(falls)
    assert all(factor > line for factor, line in zip(factors[1:-1], lines, strict=True))


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_every_schedule_stays_between_zero_and_the_rate(name: str, warmup_steps: int):
    """And never is 0 before the run's end."""
    schedule = SHORT[name](warmup_steps=warmup_steps)
    for max_steps in (1, 2, 7, 100):
        factors = [schedule(step, max_steps) for step in range(max_steps)]
        assert all(0 < factor <= 1 for factor in factors), (max_steps, factors)


@pytest.mark.parametrize("name", sorted(set(SHORT) - {"constant"}))
def test_a_schedule_that_ends_with_the_run_needs_its_length(name: str):
    with pytest.raises(UserError, match="needs the length of the run"):
        lr_factor(build_schedule(name), max_steps=-1)
    assert lr_factor(build_schedule("constant"), max_steps=-1)(7) == 1.0


def test_a_schedule_is_a_class_whose_objects_are_called():
    assert get_args(ScheduleName) == tuple(SHORT)
    assert issubclass(Cosine, LRSchedule) and isinstance(build_schedule("wsd"), WSD)
    schema = {"lr_schedule": ScheduleNode}
    check({"lr_schedule": "cosine"}, schema)
    check({"lr_schedule": {"target": "ldm.optim.schedules.WSD", "params": {"decay": 0.1}}}, schema)
    for wrong in ("exponential", {"target": "ldm.optim.schedules.WSD", "params": {"decay": 2}}):
        with pytest.raises(UserError, match="lr_schedule"):
            check({"lr_schedule": wrong}, schema)
    with pytest.raises(UserError, match="StepLR is no LRSchedule"):
        step = {"target": "torch.optim.lr_scheduler.StepLR", "params": {"step_size": 2}}
        check({"lr_schedule": step}, schema)
