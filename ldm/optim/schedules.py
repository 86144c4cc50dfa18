"""Learning-rate schedules: the optimizer step, and the length of the run -> a factor of the learning rate."""

import math
from typing import Annotated, Literal, Protocol, runtime_checkable

from ldm.annotations import Builds, Node, NonNegativeInt, PositiveFloat, PositiveInt, Probability
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

    def done(self, step: int, max_steps: int) -> float:
        """Share of the steps after the warm-up that are done, from 0 to 1."""
        return min(1.0, (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps))


class Cosine(Constant):
    """Half a cosine from the rate to 0 (Loshchilov & Hutter 2017)."""

    def after_warmup(self, step: int, max_steps: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * self.done(step, max_steps)))


class CosineRestarts(Constant):
    """Several half cosines from the rate to 0, one after the other (SGDR, Loshchilov & Hutter 2017).

    cycles: how many, all of one length.
    """

    def __init__(self, *, warmup_steps: NonNegativeInt = 0, cycles: PositiveInt = 4):
        super().__init__(warmup_steps=warmup_steps)
        self.cycles = cycles

    def after_warmup(self, step: int, max_steps: int) -> float:
        done = self.done(step, max_steps)
        return 0.0 if done == 1 else 0.5 * (1 + math.cos(math.pi * (self.cycles * done % 1)))


class Polynomial(Constant):
    """From the rate to `end` of it as a power of the steps that are left.

    power: 1 is a straight line. end: factor of the rate after the last step.
    """

    def __init__(
        self, *, warmup_steps: NonNegativeInt = 0, power: PositiveFloat = 2.0, end: Probability = 0.0
    ):
        super().__init__(warmup_steps=warmup_steps)
        self.power = power
        self.end = end

    def after_warmup(self, step: int, max_steps: int) -> float:
        return self.end + (1 - self.end) * (1 - self.done(step, max_steps)) ** self.power


class Linear(Polynomial):
    """A straight line from the rate to `end` of it."""

    def __init__(self, *, warmup_steps: NonNegativeInt = 0, end: Probability = 0.0):
        super().__init__(warmup_steps=warmup_steps, power=1.0, end=end)


class REX(Constant):
    """Reflected exponential: slow at first, then fast to 0 (Chen et al. 2021, "REX", sec. 3).

    With z of the steps done, the factor is (1 - z) / (1/2 + 1/2 (1 - z)).
    """

    def after_warmup(self, step: int, max_steps: int) -> float:
        left = 1 - self.done(step, max_steps)
        return left / (0.5 + 0.5 * left)


class WSD(Constant):
    """Warmup-stable-decay: constant, then linear to 0 (Hägele et al. 2024).

    It is about as good as a cosine, and a run can be made longer.

    decay: share of the steps in which the rate decays; at most those after the warmup.
    """

    def __init__(self, *, warmup_steps: NonNegativeInt = 0, decay: Probability = 0.2):
        super().__init__(warmup_steps=warmup_steps)
        self.decay = decay

    def after_warmup(self, step: int, max_steps: int) -> float:
        decaying = max(1, min(round(self.decay * max_steps), max_steps - self.warmup_steps))
        return min(1.0, max(0.0, (max_steps - step) / decaying))


ScheduleName = Literal["constant", "linear", "polynomial", "cosine", "cosine_restarts", "wsd", "rex"]
ScheduleNode = ScheduleName | Annotated[Node, Builds(LRSchedule)]
SHORT = {
    "constant": Constant,
    "linear": Linear,
    "polynomial": Polynomial,
    "cosine": Cosine,
    "cosine_restarts": CosineRestarts,
    "wsd": WSD,
    "rex": REX,
}


def build_schedule(schedule: ScheduleNode) -> LRSchedule:
    """A short name stands for the class with its defaults."""
    return SHORT[schedule]() if isinstance(schedule, str) else bound(schedule)
