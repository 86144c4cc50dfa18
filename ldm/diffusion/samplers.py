"""Samplers: from noise to a latent, given any `denoise(x [B, C, h, w], level) -> x0 [B, C, h, w]`.

Each is a function of the same signature and readable alone: `levels` are those of the steps, noisiest first,
and the one where the last step ends, which may be without noise. Their formulas hold for x = a x0 + s noise
of any a and s. What they ask for is x0, which is well defined also where a is next to 0, at the noisiest
level of a zero-terminal-SNR schedule. From there the step is Euler's: between s / a = 4096 and the next level
a mean of eps at both ends would move x by many times what the two x0 differ by. `denoise` is called at
levels[:-1] alone.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from ldm.diffusion.guidance import Denoise
from ldm.diffusion.process import Level
from ldm.diffusion.schedule import Spacing

Noise = Callable[[int], Tensor]  # step index -> standard normal noise, shaped like x
Callback = Callable[[int, Tensor], object]  # step index, x after the step
Known = tuple[Tensor, Level]  # a prediction of x0, and the level at which it was made
SamplerName = Literal["ddim", "plms", "dpm++2m", "euler", "euler_a", "heun", "dpm++2m_sde", "unipc"]


@runtime_checkable
class Sampler(Protocol):
    """A sampler: from noise x at levels[0] to a latent at levels[-1]."""

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        levels: Sequence[Level],
        *,
        noise: Noise | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """x: [B, C, h, w] -> [B, C, h, w].

        `noise` is asked for at most once a step, by its index: it is a function of an image's own seed and of
        the step. `callback` is called after each step.
        """


# Weights of the last n predictions, newest first (Liu et al. 2022, eq. 12).
ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def eps_of(x: Tensor, x0: Tensor, level: Level) -> Tensor:
    """The noise in x, if x0 is what it hides."""
    return (x - level.a * x0) / level.s


def ddim(
    denoise: Denoise,
    x: Tensor,
    levels: Sequence[Level],
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Song et al. 2021, eq. 12. `eta` in [0, 1]: 0 is deterministic, 1 has the variance of DDPM.

    Above 0 it needs `noise`.
    """
    if eta > 0 and noise is None:
        raise ValueError("Steps with fresh noise need `noise`")
    for i, (level, end) in enumerate(pairwise(levels)):
        x0 = denoise(x, level)
        sigma = eta * end.s / level.s * math.sqrt(1 - (level.a / end.a) ** 2)  # eq. 16
        x = end.a * x0 + math.sqrt(end.s**2 - sigma**2) * eps_of(x, x0, level)
        if eta > 0:
            x = x + sigma * noise(i)
        if callback:
            callback(i, x)
    return x


def plms(
    denoise: Denoise,
    x: Tensor,
    levels: Sequence[Level],
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Pseudo linear multistep (Liu et al. 2022): one prediction a step, but two in the first.

    Stable Diffusion's variant of their algorithm 2: it begins with a Heun step (from noise alone an Euler
    step) and orders 2 and 3 in the place of Runge-Kutta steps. Deterministic: `noise` is not used.
    """
    recent: list[Tensor] = []  # the last predictions of eps, newest first
    for i, (level, end) in enumerate(pairwise(levels)):
        eps = eps_of(x, denoise(x, level), level)
        recent = [eps, *recent[:3]]
        if i == 0 and len(levels) > 2 and not level.is_noise_alone:  # Heun: the mean of the step's ends
            ahead = transfer(x, eps, level, end)
            eps = (eps + eps_of(ahead, denoise(ahead, end), end)) / 2
        else:
            eps = sum(c * e for c, e in zip(ADAMS_BASHFORTH[len(recent)], recent, strict=True))
        x = transfer(x, eps, level, end)
        if callback:
            callback(i, x)
    return x


def euler(
    denoise: Denoise,
    x: Tensor,
    levels: Sequence[Level],
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Euler's method on the probability flow (Karras et al. 2022, algorithm 1 without the correction).

    In its variables x / a and s / a the flow is d(x / a) = eps d(s / a), so Euler's step is that of DDIM;
    what differs is the last level, which is without noise. Deterministic: `noise` is not used.
    """
    return ddim(denoise, x, levels, callback=callback)


def euler_a(
    denoise: Denoise,
    x: Tensor,
    levels: Sequence[Level],
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling with Euler's method, as k-diffusion has it; it needs `noise`.

    Euler's step to less noise than there shall be, and fresh noise of the variance that DDPM has: the step of
    DDIM with eta 1.
    """
    return ddim(denoise, x, levels, eta=1.0, noise=noise, callback=callback)


def heun(
    denoise: Denoise,
    x: Tensor,
    levels: Sequence[Level],
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Heun's method of order two on the same flow (Karras et al. 2022, algorithm 1).

    Two predictions a step, the mean of eps at both ends; one in the last step, and in the first one from
    noise alone. Deterministic: `noise` is not used.
    """
    for i, (level, end) in enumerate(pairwise(levels)):
        x0 = denoise(x, level)
        eps = eps_of(x, x0, level)
        x_next = end.a * x0 + end.s * eps
        if i < len(levels) - 2 and not level.is_noise_alone:
            ahead = eps_of(x_next, denoise(x_next, end), end)
            ratio = end.a * level.s / level.a  # of x to x_next, where all is noise
            x_next = x_next + (end.s - ratio) / 2 * (ahead - eps)
        x = x_next
        if callback:
            callback(i, x)
    return x


def dpm_solver_pp_2m(
    denoise: Denoise,
    x: Tensor,
    levels: Sequence[Level],
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M), the multistep solver of order two in data prediction (Lu et al. 2022b, algorithm 2).

    One prediction a step. The first step is of order one, as nothing precedes it, and so is the last one,
    which crosses the widest range of SNR. Deterministic: `noise` is not used.
    """
    x0_before, h_before = x, 0.0
    for i, (level, end) in enumerate(pairwise(levels)):
        x0, h = denoise(x, level), end.half_log_snr - level.half_log_snr
        data = x0 if i == len(levels) - 2 else extrapolated(x0, h, x0_before, h_before)
        x = exponential_step(x, data, level, end)
        x0_before, h_before = x0, h
        if callback:
            callback(i, x)
    return x


def dpm_solver_pp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    levels: Sequence[Level],
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """SDE-DPM-Solver++(2M): the same on the diffusion SDE (Lu et al. 2022b); it needs `noise`.

    One prediction a step, with the same data D as `dpm_solver_pp_2m`, which gets twice the weight, and fresh
    noise in the place of the rest of the old.
    """
    if noise is None:
        raise ValueError("Steps with fresh noise need `noise`")
    x0_before, h_before = x, 0.0
    for i, (level, end) in enumerate(pairwise(levels)):
        x0, h = denoise(x, level), end.half_log_snr - level.half_log_snr
        data = x0 if i == len(levels) - 2 else extrapolated(x0, h, x0_before, h_before)
        fresh = -math.expm1(-2 * h)  # share of the variance of the noise
        x = end.s / level.s * math.exp(-h) * x + end.a * fresh * data + end.s * math.sqrt(fresh) * noise(i)
        x0_before, h_before = x0, h
        if callback:
            callback(i, x)
    return x


def unipc(
    denoise: Denoise,
    x: Tensor,
    levels: Sequence[Level],
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """UniPC-2 in data prediction with B(h) = exp(h) - 1 (Zhao et al. 2023).

    One prediction a step: that at the predicted x also corrects the step that led there. The predictor is
    then DPM-Solver++(2M), the corrector is of an order more. Deterministic: `noise` is not used.
    """
    before: list[Known] = []  # the last two, newest first
    start = x  # x at the level of before[0]
    for i, (level, end) in enumerate(pairwise(levels)):
        x0 = denoise(x, level)
        start = unic(start, before, x0, level) if before else x
        before = [(x0, level), *before[:1]]
        x = unip(start, before if i < len(levels) - 2 else before[:1], end)
        if callback:
            callback(i, x)
    return x


def unip(x: Tensor, before: Sequence[Known], end: Level) -> Tensor:
    """UniP, of as many orders as predictions are given, from x at the level of before[0] to `end`."""
    (x0, level), *older = before
    h = end.half_log_snr - level.half_log_snr
    data = x0
    for x0_older, level_older in older:
        h_before = level.half_log_snr - level_older.half_log_snr
        data = extrapolated(x0, h, x0_older, h_before)
    return exponential_step(x, data, level, end)


def unic(x: Tensor, before: Sequence[Known], x0_end: Tensor, end: Level) -> Tensor:
    """UniC: the same step, given the prediction at its end too.

    Their system of equations for rho, solved by hand for one and two points before.
    """
    (x0, level), *older = before
    h = end.half_log_snr - level.half_log_snr
    if h == 0:
        return x
    data = (x0 + x0_end) / 2
    for x0_older, level_older in older:
        r = (level_older.half_log_snr - level.half_log_snr) / h
        if r < 0:
            B = math.expm1(-h)
            b_1 = (-B / h - 1) / B
            b_2 = 2 * ((B / h + 1) / h - 1 / 2) / B
            rho = (b_1 - b_2) / (1 - r)
            data = x0 + rho / r * (x0_older - x0) + (b_1 - rho) * (x0_end - x0)
    return exponential_step(x, data, level, end)


def extrapolated(x0: Tensor, h: float, x0_before: Tensor, h_before: float) -> Tensor:
    """D of Lu et al. 2022b, algorithm 2: x0 in the middle of a step of h, from the prediction h_before ago.

    x0 itself where there is none, h_before 0.
    """
    return x0 if h_before == 0 else x0 + h / (2 * h_before) * (x0 - x0_before)


def exponential_step(x: Tensor, data: Tensor, level: Level, end: Level) -> Tensor:
    """The exact step of the flow to `end` if x0 is `data` all the way (Lu et al. 2022b, proposition 4.1)."""
    h = end.half_log_snr - level.half_log_snr
    return end.s / level.s * x - end.a * math.expm1(-h) * data


def transfer(x: Tensor, eps: Tensor, level: Level, end: Level) -> Tensor:
    """The exact step of the flow to `end` if the noise is `eps` all the way (Liu et al. 2022)."""
    return end.a / level.a * (x - level.s * eps) + end.s * eps


SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim,
    "plms": plms,
    "dpm++2m": dpm_solver_pp_2m,
    "euler": euler,
    "euler_a": euler_a,
    "heun": heun,
    "dpm++2m_sde": dpm_solver_pp_2m_sde,
    "unipc": unipc,
}
# Trailing timesteps begin at the noisiest level: at 12 steps DPM-Solver++ is then twice as near to its limit.
DEFAULT_SPACING: dict[str, Spacing] = {
    name: "leading" if name in ("ddim", "plms") else "trailing" for name in SAMPLERS
}
# Those of k-diffusion's kind end without noise, the others at the schedule's first level.
ENDS_CLEAN = frozenset(SAMPLERS) - {"ddim", "plms", "dpm++2m"}
