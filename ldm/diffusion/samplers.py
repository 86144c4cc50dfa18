"""Samplers: from noise to a latent, given any `predict(x [B, C, h, w], t [B]) -> eps [B, C, h, w]`.

Each is a function of the same signature and readable alone. A step goes from alphas_cumprod[t] to that of the
next timestep; the last one goes to alphas_cumprod[0], as Stable Diffusion's own samplers do.
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from ldm.diffusion.guidance import Predict
from ldm.errors import UserError

Noise = Callable[[int], Tensor]  # step index -> standard normal noise, shaped like x
Callback = Callable[[int, Tensor], object]  # step index, x after the step
Sampler = Callable[..., Tensor]
SamplerName = Literal["ddim", "plms", "dpm++2m"]

SPACINGS = ("leading", "trailing", "linspace")
# Weights of the last n predictions, newest first (Liu et al. 2022, eq. 12).
ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def sampling_timesteps(steps: int, *, T: int = 1000, spacing: str = "leading") -> Tensor:
    """Exactly `steps` timesteps, descending -> [S] int64 (Lin et al. 2024, table 2).

    "leading" is Stable Diffusion's own: multiples of T // steps, plus 1. "trailing" begins at T - 1,
    "linspace" begins at T - 1 and ends at 0.
    """
    if not 1 <= steps <= T:
        raise UserError(f"{steps} sampling steps are impossible", remedy=f"Choose from 1 to {T}.")
    i = torch.arange(steps, dtype=torch.float64)
    match spacing:
        case "leading":
            ascending = (i * (T // steps) + 1).clamp(max=T - 1)
        case "trailing":
            ascending = (T - (steps - 1 - i) * (T / steps)).round() - 1
        case "linspace":
            ascending = torch.linspace(0, T - 1, steps, dtype=torch.float64).round()
        case _:
            raise UserError(
                f"The spacing {spacing!r} is unknown", remedy=f"Choose one of {', '.join(SPACINGS)}."
            )
    return ascending.long().flip(0)


def ddim_step(
    x: Tensor,
    eps: Tensor,
    alpha: float,
    alpha_next: float,
    *,
    sigma: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """From the noise level of `alpha` to that of `alpha_next` (Song et al. 2021, eq. 12)."""
    x0 = (x - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)
    x_next = math.sqrt(alpha_next) * x0 + math.sqrt(1 - alpha_next - sigma**2) * eps
    return x_next if noise is None else x_next + sigma * noise


def ddim(
    predict: Predict,
    x: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Song et al. 2021. `eta` 0 is deterministic, 1 has the variance of DDPM and needs `noise`."""
    if not 0 <= eta <= 1:
        raise UserError(f"eta {eta} is impossible", remedy="Choose from 0 to 1.")
    if eta > 0 and noise is None:
        raise ValueError("eta > 0 needs noise")
    for i, t, alpha, alpha_next in _walk(timesteps, alphas_cumprod):
        eps = predict(x, _batch_of(t, x))
        sigma = eta * math.sqrt((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next))  # eq. 16
        x = ddim_step(x, eps, alpha, alpha_next, sigma=sigma, noise=noise(i) if eta > 0 else None)
        if callback:
            callback(i, x)
    return x


def plms(
    predict: Predict,
    x: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Pseudo linear multistep (Liu et al. 2022): one prediction a step, but two in the first.

    Stable Diffusion's variant of their algorithm 2: it begins with a Heun step and orders 2 and 3 in the
    place of Runge-Kutta steps. Deterministic: `eta` must be 0, and `noise` is not used.
    """
    if eta != 0:
        raise UserError(f"The plms sampler has no eta (it is {eta})", remedy="Set eta to 0 or use ddim.")
    recent: list[Tensor] = []  # the last predictions, newest first
    for i, t, alpha, alpha_next in _walk(timesteps, alphas_cumprod):
        eps = predict(x, _batch_of(t, x))
        recent = [eps, *recent[:3]]
        if i == 0 and len(timesteps) > 1:  # Heun's method: the mean of both ends of the step
            ahead = predict(ddim_step(x, eps, alpha, alpha_next), _batch_of(int(timesteps[1]), x))
            eps = (eps + ahead) / 2
        else:
            eps = sum(c * e for c, e in zip(ADAMS_BASHFORTH[len(recent)], recent, strict=True))
        x = ddim_step(x, eps, alpha, alpha_next)
        if callback:
            callback(i, x)
    return x


def dpm_solver_pp_2m(
    predict: Predict,
    x: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M), the multistep solver of order two in data prediction (Lu et al. 2022b, algorithm 2).

    One prediction a step. The first step is of order one, as nothing precedes it, and so is the last one,
    which crosses the widest range of SNR. Deterministic: `eta` must be 0, and `noise` is not used.
    """
    if eta != 0:
        raise UserError(f"The dpm++2m sampler has no eta (it is {eta})", remedy="Set eta to 0 or use ddim.")
    x0_before, h_before = x, 0.0
    for i, t, alpha, alpha_next in _walk(timesteps, alphas_cumprod):
        x0 = (x - math.sqrt(1 - alpha) * predict(x, _batch_of(t, x))) / math.sqrt(alpha)
        h = _half_log_snr(alpha_next) - _half_log_snr(alpha)
        first_order = h_before == 0 or i == len(timesteps) - 1
        data = x0 if first_order else x0 + h / (2 * h_before) * (x0 - x0_before)  # D of algorithm 2
        x = math.sqrt((1 - alpha_next) / (1 - alpha)) * x - math.sqrt(alpha_next) * math.expm1(-h) * data
        x0_before, h_before = x0, h
        if callback:
            callback(i, x)
    return x


SAMPLERS: dict[str, Sampler] = {"ddim": ddim, "plms": plms, "dpm++2m": dpm_solver_pp_2m}
# Trailing timesteps begin at the noisiest level: at 12 steps DPM-Solver++ is then twice as near to its limit.
DEFAULT_SPACING: dict[str, str] = {"ddim": "leading", "plms": "leading", "dpm++2m": "trailing"}


def _half_log_snr(alpha: float) -> float:
    """lambda = log(a / s) of a noise level, the solver's time."""
    return 0.5 * math.log(alpha / (1 - alpha))


def _walk(timesteps: Tensor, alphas_cumprod: Tensor) -> Iterator[tuple[int, int, float, float]]:
    """(step index, timestep, its alphas_cumprod, that of the next timestep), in Python's float64."""
    levels = torch.cat([alphas_cumprod[timesteps.to(alphas_cumprod.device)], alphas_cumprod[:1]]).tolist()
    yield from zip(range(len(timesteps)), timesteps.tolist(), levels[:-1], levels[1:], strict=True)


def _batch_of(t: int, x: Tensor) -> Tensor:
    """The timestep of every item -> [B] int64 on x's device."""
    return torch.full((len(x),), t, dtype=torch.int64, device=x.device)
