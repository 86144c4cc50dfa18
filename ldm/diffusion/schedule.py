"""The noise schedule: one tensor, `alphas_cumprod` [T], and everything that follows from it.

A noisy latent is x_t = a x0 + s eps with a² = alphas_cumprod[t] and s² = 1 - a² (Ho et al. 2020, eq. 4).
A network predicts "eps", "x0" or "v" = a eps - s x0 (Salimans & Ho 2022, appendix D).
Coefficients stay float32 whatever the precision of the latents: in bfloat16, 1 - a² loses whole timesteps.
"""

import torch
from torch import Tensor

from ldm.errors import UserError

PARAMETERIZATIONS = ("eps", "v", "x0")
BETA_SCHEDULES = ("scaled_linear", "linear")
TERMINAL = 2.0**-24  # stands for the 0 of zero terminal SNR


def make_alphas_cumprod(
    *,
    beta_schedule: str = "scaled_linear",
    linear_start: float = 0.00085,
    linear_end: float = 0.012,
    timesteps: int = 1000,
    zero_terminal_snr: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Cumulative products of 1 - beta -> [T], computed in float64 whatever the dtype that is returned.

    "scaled_linear": sqrt(beta) grows linearly (Stable Diffusion, whose own code calls this "linear");
    "linear": beta itself does (Ho et al. 2020). `zero_terminal_snr` shifts and scales the square roots so
    that the last timestep is noise alone (Lin et al. 2024, algorithm 1), but for TERMINAL: samplers divide.
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
    """Whether a schedule has zero terminal SNR; then sampling must begin at its last timestep."""
    return bool(alphas_cumprod[-1] <= TERMINAL)


def snr(timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Signal-to-noise ratio a² / s². timesteps: [B] -> [B] float32."""
    alpha = alphas_cumprod[timesteps].float()
    return alpha / (1 - alpha)


def add_noise(x0: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """x_t. x0, noise: [B, C, h, w], timesteps: [B] -> [B, C, h, w] in x0's dtype."""
    a, s = _coefficients(timesteps, alphas_cumprod, x0.ndim)
    return (a * x0.float() + s * noise.float()).to(x0.dtype)


def training_target(
    parameterization: str, x0: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """What the network should predict at x_t. x0, noise: [B, C, h, w] -> [B, C, h, w] in x0's dtype."""
    check_parameterization(parameterization)
    if parameterization != "v":
        return noise.to(x0.dtype) if parameterization == "eps" else x0
    a, s = _coefficients(timesteps, alphas_cumprod, x0.ndim)
    return (a * noise.float() - s * x0.float()).to(x0.dtype)


def to_eps(
    parameterization: str, prediction: Tensor, x_t: Tensor, timesteps: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """The noise eps that a prediction made at x_t stands for -> [B, C, h, w] in its dtype."""
    check_parameterization(parameterization)
    if parameterization == "eps":
        return prediction
    a, s = _coefficients(timesteps, alphas_cumprod, x_t.ndim)
    p, x = prediction.float(), x_t.float()
    return (a * p + s * x if parameterization == "v" else (x - a * p) / s).to(prediction.dtype)


def to_x0(
    parameterization: str, prediction: Tensor, x_t: Tensor, timesteps: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """The clean latent x0 that a prediction made at x_t stands for -> [B, C, h, w] in its dtype."""
    check_parameterization(parameterization)
    if parameterization == "x0":
        return prediction
    a, s = _coefficients(timesteps, alphas_cumprod, x_t.ndim)
    p, x = prediction.float(), x_t.float()
    return (a * x - s * p if parameterization == "v" else (x - s * p) / a).to(prediction.dtype)


def check_parameterization(parameterization: str) -> None:
    """Refuses a prediction type that is unknown here."""
    _check("parameterization", parameterization, PARAMETERIZATIONS)


def _check(key: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise UserError(f"{key} {value!r} is unknown", remedy=f"Choose one of {', '.join(valid)}.")


def _coefficients(timesteps: Tensor, alphas_cumprod: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
    """(a, s) of each item in float32, [B, 1, ...] with `ndim` dimensions."""
    alpha = alphas_cumprod[timesteps].float().reshape(-1, *[1] * (ndim - 1))
    return alpha.sqrt(), (1 - alpha).sqrt()
