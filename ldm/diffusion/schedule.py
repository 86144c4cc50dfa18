"""The noise schedule and the noise levels of a sampling: pure maths, of which `DiscreteDiffusion` is made."""

from typing import Literal, get_args

import torch
from torch import Tensor

from ldm.errors import UserError

Spacing = Literal["leading", "trailing", "linspace", "karras"]

BETA_SCHEDULES = ("scaled_linear", "linear")
SPACINGS: tuple[str, ...] = get_args(Spacing)
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
    """Cumulative products of 1 - beta -> [T] on the CPU, computed in float64.

    "scaled_linear": sqrt(beta) grows linearly (Stable Diffusion, whose own code calls this "linear");
    "linear": beta grows linearly (Ho et al. 2020). zero_terminal_snr: rescales the schedule so that the last
    timestep is pure noise (Lin et al. 2024, algorithm 1), except for TERMINAL, which keeps SNRs above 0.
    """
    check_choice("beta_schedule", beta_schedule, BETA_SCHEDULES)
    power = 2 if beta_schedule == "scaled_linear" else 1
    start, end = linear_start ** (1 / power), linear_end ** (1 / power)
    betas = torch.linspace(start, end, timesteps, dtype=torch.float64, device="cpu") ** power
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    if zero_terminal_snr:
        root = alphas_cumprod.sqrt()
        alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        alphas_cumprod[-1] = TERMINAL
    return alphas_cumprod.to(dtype)


def sampling_timesteps(steps: int, *, T: int = 1000, spacing: str = "leading") -> Tensor:
    """Exactly `steps` timesteps, descending -> [S] int64 (Lin et al. 2024, table 2).

    "leading" is Stable Diffusion's own: multiples of T // steps, plus 1; where `steps` does not divide T it
    begins lower, at 895 for 150 steps of 1000. "trailing" begins at T - 1, "linspace" begins at T - 1 and
    ends at 0. Raises UserError where there are not as many timesteps.
    """
    check_steps(steps, T)
    i = torch.arange(steps, dtype=torch.float64)
    match spacing:
        case "leading":
            ascending = (i * (T // steps) + 1).clamp(max=T - 1)
        case "trailing":
            ascending = (T - (steps - 1 - i) * (T / steps)).round() - 1
        case "linspace":
            first = 0 if steps > 1 else T - 1
            ascending = (first + i * ((T - 1) / max(steps - 1, 1))).round()
        case _:
            raise ValueError(f"{spacing!r} is no spacing of timesteps")
    return ascending.long().flip(0)


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, *, rho: float = 7.0) -> list[float]:
    """Ratios of noise to signal from sigma_max down to sigma_min, S of them (Karras et al. 2022, eq. 5)."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    inner = max(steps - 1, 1)
    return [(high + i / inner * (low - high)) ** rho for i in range(steps)]


def check_steps(steps: int, T: int) -> None:
    """Raises UserError for a number of sampling steps that the schedule does not have."""
    if not 1 <= steps <= T:
        raise UserError(f"{steps} sampling steps are impossible", remedy=f"Choose from 1 to {T}.")


def check_choice(key: str, value: str, valid: tuple[str, ...]) -> None:
    """Raises UserError for a value that is not among the valid ones."""
    if value not in valid:
        raise UserError(f"{key} {value!r} is unknown", remedy=f"Choose one of {', '.join(valid)}.")
