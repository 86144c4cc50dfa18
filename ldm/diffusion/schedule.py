"""The noise schedule: one tensor, `alphas_cumprod` [T], and what follows from it.

A noisy latent is x_t = a x0 + s eps with a² = alphas_cumprod[t] and s² = 1 - a² (Ho et al. 2020, eq. 4).
A network predicts "eps", "x0" or "v" = a eps - s x0 (Salimans & Ho 2022, appendix D).
Coefficients stay float32 whatever the precision of the latents: in bfloat16, 1 - a² loses whole timesteps.
"""

import torch
from torch import Tensor

from ldm.errors import UserError

PARAMETERIZATIONS = ("eps", "v", "x0")
BETA_SCHEDULES = ("scaled_linear", "linear")
TERMINAL = 2.0**-24  # the last alphas_cumprod of a zero-terminal-SNR schedule, in place of 0


def make_alphas_cumprod(
    *,
    beta_schedule: str = "scaled_linear",
    linear_start: float = 0.00085,
    linear_end: float = 0.012,
    timesteps: int = 1000,
    zero_terminal_snr: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Cumulative products of 1 - beta -> [T], computed in float64.

    "scaled_linear": sqrt(beta) grows linearly (Stable Diffusion, whose own code calls this "linear");
    "linear": beta grows linearly (Ho et al. 2020). zero_terminal_snr: rescales the schedule so that the last
    timestep is pure noise (Lin et al. 2024, algorithm 1), except for TERMINAL, by which samplers divide.
    """
    _check("beta_schedule", beta_schedule, BETA_SCHEDULES)
    power = 2 if beta_schedule == "scaled_linear" else 1
    start, end = linear_start ** (1 / power), linear_end ** (1 / power)
    betas = torch.linspace(start, end, timesteps, dtype=torch.float64) ** power
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    if zero_terminal_snr:
        root = alphas_cumprod.sqrt()
        alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        alphas_cumprod[-1] = TERMINAL
    return alphas_cumprod.to(dtype)


def has_zero_terminal_snr(alphas_cumprod: Tensor) -> bool:
    """Whether the schedule has zero terminal SNR; sampling must then begin at its last timestep."""
    return bool(alphas_cumprod[-1] <= TERMINAL)


def snr(timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Signal-to-noise ratio a² / s². timesteps: [B] -> [B] float32."""
    alpha = alphas_cumprod[timesteps].float()
    return alpha / (1 - alpha)


def add_noise(x0: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Forward process, x_t = a x0 + s noise. x0, noise: [B, C, h, w], timesteps: [B] -> [B, C, h, w]."""
    a, s = _coefficients(timesteps, alphas_cumprod, x0.ndim)
    return (a * x0.float() + s * noise.float()).to(x0.dtype)


def training_target(
    parameterization: str, x0: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """The target of the network's prediction at x_t. x0, noise: [B, C, h, w] -> x0's shape and dtype."""
    check_parameterization(parameterization)
    if parameterization != "v":
        return noise.to(x0.dtype) if parameterization == "eps" else x0
    a, s = _coefficients(timesteps, alphas_cumprod, x0.ndim)
    return (a * noise.float() - s * x0.float()).to(x0.dtype)


def to_eps(
    parameterization: str, prediction: Tensor, x_t: Tensor, timesteps: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """Converts a prediction at x_t to eps -> [B, C, h, w] in its dtype."""
    check_parameterization(parameterization)
    if parameterization == "eps":
        return prediction
    a, s = _coefficients(timesteps, alphas_cumprod, x_t.ndim)
    p, x = prediction.float(), x_t.float()
    return (a * p + s * x if parameterization == "v" else (x - a * p) / s).to(prediction.dtype)


def to_x0(
    parameterization: str, prediction: Tensor, x_t: Tensor, timesteps: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """Converts a prediction at x_t to x0 -> [B, C, h, w] in its dtype."""
    check_parameterization(parameterization)
    if parameterization == "x0":
        return prediction
    a, s = _coefficients(timesteps, alphas_cumprod, x_t.ndim)
    p, x = prediction.float(), x_t.float()
    return (a * x - s * p if parameterization == "v" else (x - s * p) / a).to(prediction.dtype)


def check_parameterization(parameterization: str) -> None:
    """Raises UserError for an unknown prediction type."""
    _check("parameterization", parameterization, PARAMETERIZATIONS)


def _check(key: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise UserError(f"{key} {value!r} is unknown", remedy=f"Choose one of {', '.join(valid)}.")


def _coefficients(timesteps: Tensor, alphas_cumprod: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
    """(a, s) of each item in float32, [B, 1, ...] with `ndim` dimensions."""
    alpha = alphas_cumprod[timesteps].float().reshape(-1, *[1] * (ndim - 1))
    return alpha.sqrt(), (1 - alpha).sqrt()
