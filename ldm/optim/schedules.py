"""Learning-rate schedules: the optimizer step, and the length of the run -> a factor of the learning rate."""

import math
from typing import Annotated, Literal, Protocol, runtime_checkable

from ldm.annotations import Builds, Node, NonNegativeInt, Probability
from ldm.config import bound


@runtime_checkable
class LRSchedule(Protocol):
    """A learning-rate schedule."""

    def __call__(self, step: int, max_steps: int) -> float:
        """The factor of the learning rates at an optimizer step, counted from 0, of a run of `max_steps`."""


class Constant:
    """The same rate at every step.

    warmup_steps: optimizer steps in which the rates rise linearly from 0.
    """

    def __init__(self, *, warmup_steps: NonNegativeInt = 0):
        self.warmup_steps = warmup_steps

    def __call__(self, step: int, max_steps: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self.after_warmup(step, max_steps)

    def after_warmup(self, step: int, max_steps: int) -> float:
        return 1.0


class Cosine(Constant):
    """Half a cosine from the rate to 0 (Loshchilov & Hutter 2017)."""

    def after_warmup(self, step: int, max_steps: int) -> float:
        done = (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class WSD(Constant):
    """Warmup-stable-decay: constant, then linear to 0 (Hägele et al. 2024).

    It is about as good as a cosine, and a run can be made longer.

    decay: share of the steps in which the rate decays.
    """

    def __init__(self, *, warmup_steps: NonNegativeInt = 0, decay: Probability = 0.2):
        super().__init__(warmup_steps=warmup_steps)
        self.decay = decay

    def after_warmup(self, step: int, max_steps: int) -> float:
        return min(1.0, max(0.0, (max_steps - step) / max(1, round(self.decay * max_steps))))


ScheduleName = Literal["constant", "cosine", "wsd"]
ScheduleNode = ScheduleName | Annotated[Node, Builds(LRSchedule)]
SHORT = {"constant": Constant, "cosine": Cosine, "wsd": WSD}


def build_schedule(schedule: ScheduleNode) -> LRSchedule:
    """A short name stands for the class with its defaults."""
    return SHORT[schedule]() if isinstance(schedule, str) else bound(schedule)
