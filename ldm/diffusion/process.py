"""The noise process: how noise is added to a latent in training and taken away in sampling.

`NoiseProcess` is all that training and sampling know of it. `DiscreteDiffusion` is Stable Diffusion's.
A noisy latent is x_t = a x0 + s noise. A sampler sees the process only as a list of `Level`s and as a
function from x_t to the *denoised* latent, the prediction of x0, whatever it is that the network predicts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from ldm.annotations import NonNegativeFloat, Timesteps, Variance
from ldm.diffusion.schedule import (
    SPACINGS,
    TERMINAL,
    check_choice,
    check_steps,
    karras_sigmas,
    make_alphas_cumprod,
    sampling_timesteps,
)
from ldm.errors import UserError
from ldm.randomness import ItemRNG

PARAMETERIZATIONS = ("eps", "v", "x0")


class Level(NamedTuple):
    """A noise level, x_t = a x0 + s noise, in Python's float64."""

    a: float  # of the signal
    s: float  # standard deviation of the noise
    t: float  # the timestep that the network is told; it need not be a whole number

    @property
    def half_log_snr(self) -> float:
        """lambda = log(a / s), infinite without noise (Lu et al. 2022a)."""
        return math.log(self.a / self.s) if self.s > 0 else math.inf

    @property
    def is_noise_alone(self) -> bool:
        """Whether next to no signal is left, as at the last timestep of a zero-terminal-SNR schedule."""
        return self.a**2 < 2 * TERMINAL


CLEAN = Level(1.0, 0.0, 0.0)


class NoiseProcess(Protocol):
    """What training and sampling ask of a noise process. Times t: [B], one for each item."""

    parameterization: str  # what the network predicts
    zero_terminal_snr: bool  # whether the noisiest level is noise alone; sampling must then begin there

    def sample_times(self, rng: ItemRNG, out: Tensor) -> None:
        """Fills `out` [B] with the times of a training step."""

    def sample_noise(self, rng: ItemRNG, out: Tensor) -> None:
        """Fills `out` [B, C, h, w] with the noise of a training step."""

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of latents. x0, noise: [B, C, h, w] -> [B, C, h, w]."""

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should predict at x_t. x0, noise: [B, C, h, w] -> [B, C, h, w]."""

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio a² / s² -> [B] float32."""

    def error_scale(self, t: Tensor) -> Tensor | int:
        """Squared error of the prediction, where that of its x0 is 1 -> [B] float32, or a constant."""

    def levels(self, steps: int, spacing: str, *, clean: bool = False) -> list[Level]:
        """`steps` + 1 levels of a sampling, the noisiest first; at the last one it ends."""

    def start(self, noise: Tensor, level: Level, x0: Tensor | None = None) -> Tensor:
        """Where a sampling begins: at noise, or at the level of `x0` that it shall change (img2img)."""

    def denoised(self, prediction: Tensor, x: Tensor, level: Level) -> Tensor:
        """The x0 that follows from the network's prediction at x. [..., C, h, w] -> [..., C, h, w]."""

    def differences(self, other: "NoiseProcess") -> list[str]:
        """In which ways the predictions of another process mean something else, for an error message."""


@dataclass(frozen=True)
class ProcessConfig:
    """Settings of a `DiscreteDiffusion`.

    Args:
        parameterization: what the UNet predicts: "eps" (SD 1.x), "v" (SD 2.x at 768 pixels) or "x0".
        beta_schedule, linear_start, linear_end, timesteps: of the noise schedule.
        zero_terminal_snr: ends the schedule in noise alone (Lin et al. 2024), so that brightness is learnt
            too; not with "eps".
        offset_noise: standard deviation of what is added to all of an item's noise in a channel, so that
            brightness is learnt too (Guttenberg 2023); 0.1 is usual.
    """

    parameterization: Literal["eps", "v", "x0"] = "eps"
    beta_schedule: Literal["scaled_linear", "linear"] = "scaled_linear"
    linear_start: Variance = 0.00085
    linear_end: Variance = 0.012
    timesteps: Timesteps = 1000
    zero_terminal_snr: bool = False
    offset_noise: NonNegativeFloat = 0.0

    def build(self) -> "DiscreteDiffusion":
        alphas_cumprod = make_alphas_cumprod(
            beta_schedule=self.beta_schedule,
            linear_start=self.linear_start,
            linear_end=self.linear_end,
            timesteps=self.timesteps,
            zero_terminal_snr=self.zero_terminal_snr,
            dtype=torch.float64,
        )
        return DiscreteDiffusion(
            alphas_cumprod, parameterization=self.parameterization, offset_noise=self.offset_noise
        )


class DiscreteDiffusion(nn.Module):
    """The variance-preserving process of T timesteps, a² = alphas_cumprod[t], s² = 1 - a² (Ho et al. 2020).

    A Module so that the schedule moves with the model that it belongs to; it has nothing in the state dict.

    alphas_cumprod: [T]; exports compute their schedule buffers from it. parameterization: what the network
    predicts: "eps", the noise; "x0"; or "v" = a noise - s x0 (Salimans & Ho 2022, appendix D). offset_noise:
    standard deviation of what is added to all of an item's noise in a channel (Guttenberg 2023).
    Raises UserError for an unknown parameterization, and for "eps" with zero-terminal SNR.
    """

    def __init__(self, alphas_cumprod: Tensor, *, parameterization: str = "eps", offset_noise: float = 0.0):
        super().__init__()
        check_choice("parameterization", parameterization, PARAMETERIZATIONS)
        self.parameterization = parameterization
        self.offset_noise = offset_noise
        self.zero_terminal_snr = bool(alphas_cumprod[-1] <= TERMINAL)
        if self.zero_terminal_snr and parameterization == "eps":
            remedy = "Set process.parameterization=v for a base that predicts v, or remove the key."
            raise UserError("Zero-terminal SNR needs v-prediction", where="zero_terminal_snr", remedy=remedy)
        self._alphas: list[float] = alphas_cumprod.double().tolist()
        # Float32 whatever the precision of the latents: in bfloat16, 1 - a² loses whole timesteps.
        self.register_buffer(
            "alphas_cumprod", torch.tensor(self._alphas, dtype=torch.float32), persistent=False
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves with the model, but keeps float32 where that becomes bfloat16."""
        super()._apply(fn, recurse)
        if self.alphas_cumprod.dtype != torch.float32:
            self.alphas_cumprod = torch.tensor(
                self._alphas, dtype=torch.float32, device=self.alphas_cumprod.device
            )
        return self

    def sample_times(self, rng: ItemRNG, out: Tensor) -> None:
        """Fills `out` [B] int64 with timesteps, uniform in [0, T)."""
        rng.randint("timestep", len(self._alphas), out)

    def sample_noise(self, rng: ItemRNG, out: Tensor) -> None:
        """Fills `out` [B, C, h, w] with standard normal noise, plus offset noise."""
        rng.randn("noise", out)
        if self.offset_noise:
            offset = out.new_empty(*out.shape[:2], *[1] * (out.ndim - 2))
            rng.randn("offset", offset)
            out += self.offset_noise * offset

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = a x0 + s noise. x0, noise: [B, C, h, w], t: [B] int64 -> x0's shape and dtype."""
        a, s = self._coefficients(t, x0.ndim)
        return (a * x0.float() + s * noise.float()).to(x0.dtype)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The target of the prediction at x_t. x0, noise: [B, C, h, w], t: [B] int64 -> as x0."""
        if self.parameterization != "v":
            return noise.to(x0.dtype) if self.parameterization == "eps" else x0
        a, s = self._coefficients(t, x0.ndim)
        return (a * noise.float() - s * x0.float()).to(x0.dtype)

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio a² / s². t: [B] int64 -> [B] float32."""
        alpha = self.alphas_cumprod[t].float()
        return alpha / (1 - alpha)

    def error_scale(self, t: Tensor) -> Tensor | int:
        """SNR for "eps", SNR + 1 for "v", 1 for "x0" (Hang et al. 2023, sec. 3.4)."""
        if self.parameterization == "x0":
            return 1
        return self.snr(t) if self.parameterization == "eps" else self.snr(t) + 1

    def levels(self, steps: int, spacing: str, *, clean: bool = False) -> list[Level]:
        """`steps` + 1 levels, noisiest first, spaced as in `sampling_timesteps` or `karras_sigmas`.

        The last one is that of timestep 0, as in Stable Diffusion's own samplers, or, if `clean` and for
        "karras", without noise, as in k-diffusion's. Raises UserError for what the schedule does not have.
        """
        check_choice("spacing", spacing, SPACINGS)
        check_steps(steps, len(self._alphas))
        if self.zero_terminal_snr and spacing == "leading":
            what = "With zero-terminal SNR, sampling must begin at the last timestep"
            raise UserError(what, where="spacing", remedy="Choose trailing, or leave the spacing out.")
        if spacing == "karras":
            return [*self._karras_levels(steps), CLEAN]
        timesteps = sampling_timesteps(steps, T=len(self._alphas), spacing=spacing).tolist()
        return [*map(self.level, timesteps), CLEAN if clean else self.level(0)]

    def start(self, noise: Tensor, level: Level, x0: Tensor | None = None) -> Tensor:
        """The noise itself, or x0 with that noise at this level. x0, noise: [B, C, h, w] -> [B, C, h, w]."""
        return noise if x0 is None else level.a * x0 + level.s * noise

    def denoised(self, prediction: Tensor, x: Tensor, level: Level) -> Tensor:
        """x0 from the prediction at x, both [..., C, h, w] and float32 or wider, as in the result."""
        match self.parameterization:
            case "eps":
                return (x - level.s * prediction) / level.a
            case "v":
                return level.a * x - level.s * prediction
            case _:
                return prediction

    def differences(self, other: NoiseProcess) -> list[str]:
        """In what kind, prediction or schedule another process differs; empty if predictions may be mixed."""
        if not isinstance(other, DiscreteDiffusion):
            return ["it has another kind of noise process"]
        if other.parameterization != self.parameterization:
            return [f"its prediction type: {other.parameterization}, not {self.parameterization}"]
        if len(other._alphas) != len(self._alphas):
            return [f"its timesteps: {len(other._alphas)}, not {len(self._alphas)}"]
        same = np.allclose(other._alphas, self._alphas, rtol=1e-5, atol=0)
        return [] if same else ["it has another noise schedule"]

    def level(self, t: int) -> Level:
        """The level of a timestep in [0, T)."""
        return Level(math.sqrt(self._alphas[t]), math.sqrt(1 - self._alphas[t]), float(t))

    def _karras_levels(self, steps: int) -> list[Level]:
        """Levels at Karras' ratios s / a; timesteps are interpolated in log(s / a), as in k-diffusion."""
        ratios = [math.sqrt(1 / alpha - 1) for alpha in self._alphas]
        chosen = karras_sigmas(steps, ratios[0], ratios[-1])
        timesteps = np.interp(np.log(chosen), np.log(ratios), range(len(ratios))).tolist()
        scales = [1 / math.sqrt(1 + sigma**2) for sigma in chosen]
        return [Level(a, sigma * a, t) for a, sigma, t in zip(scales, chosen, timesteps, strict=True)]

    def _coefficients(self, t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        """(a, s) of each item in float32, [B, 1, ...] with `ndim` dimensions."""
        alpha = self.alphas_cumprod[t].float().reshape(-1, *[1] * (ndim - 1))
        return alpha.sqrt(), (1 - alpha).sqrt()
