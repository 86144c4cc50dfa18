"""Learning-rate schedules in closed form, and one of a user's own."""

import pytest

from ldm.config import check
from ldm.errors import UserError
from ldm.optim.optimizers import lr_factor
from ldm.optim.schedules import WSD, Constant, Cosine, LRSchedule, ScheduleNode, build_schedule


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


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_a_schedule_that_ends_with_the_run_needs_its_length(name: str):
    with pytest.raises(UserError, match="needs the length of the run"):
        lr_factor(build_schedule(name), max_steps=-1)
    assert lr_factor(build_schedule("constant"), max_steps=-1)(7) == 1.0


def test_a_schedule_is_a_class_whose_objects_are_called():
    assert issubclass(Cosine, LRSchedule) and isinstance(build_schedule("wsd"), WSD)
    schema = {"lr_schedule": ScheduleNode}
    check({"lr_schedule": "cosine"}, schema)
    check({"lr_schedule": {"target": "ldm.optim.schedules.WSD", "params": {"decay": 0.1}}}, schema)
    for wrong in ("linear", {"target": "ldm.optim.schedules.WSD", "params": {"decay": 2}}):
        with pytest.raises(UserError, match="lr_schedule"):
            check({"lr_schedule": wrong}, schema)
    with pytest.raises(UserError, match="StepLR is no LRSchedule"):
        step = {"target": "torch.optim.lr_scheduler.StepLR", "params": {"step_size": 2}}
        check({"lr_schedule": step}, schema)
