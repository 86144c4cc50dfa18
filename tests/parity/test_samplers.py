"""Whole trajectories against diffusers' schedulers with Stable Diffusion's settings, float32."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler

from ldm.diffusion.guidance import classifier_free_guidance
from ldm.diffusion.samplers import SPACINGS, ddim, dpm_solver_pp_2m, plms, sampling_timesteps
from ldm.diffusion.schedule import ends_in_noise, make_alphas_cumprod, to_eps
from ldm.models.attention import repeat_rows

SD = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
DRAW = torch.Generator().manual_seed(0)
X_T = torch.randn(2, 4, 8, 8, generator=DRAW)
CONTEXT, UNCONDITIONAL = torch.randn(2, 2, 5, 4, generator=DRAW)
KERNEL = torch.randn(4, 4, 3, 3, generator=DRAW) / 6
TOLERANCE = 1e-5


def network(x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """Bounded, not linear, and dependent on all of its inputs."""
    shift = context.mean(dim=1)[:, :, None, None] + torch.sin(t / 100)[:, None, None, None]
    return torch.tanh(torch.nn.functional.conv2d(x, KERNEL, padding=1) + shift) + 0.5 * x


def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return network(x, t, CONTEXT)


def run(scheduler, steps: int, model=predict, **step_options) -> torch.Tensor:
    """The loop of a diffusers pipeline."""
    scheduler.set_timesteps(steps)
    x = X_T
    for i, t in enumerate(scheduler.timesteps):
        options = {name: option(i) if callable(option) else option for name, option in step_options.items()}
        x = scheduler.step(model(x, t.expand(len(x))), int(t), x, **options).prev_sample
    return x


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def ddim_scheduler(**options) -> DDIMScheduler:
    return DDIMScheduler(**SD, clip_sample=False, **options)


@pytest.mark.parametrize("steps", [1, 7, 30, 50])
def test_ddim(steps):
    scheduler = ddim_scheduler()
    theirs = run(scheduler, steps)
    assert sampling_timesteps(steps).tolist() == scheduler.timesteps.tolist()
    ours = ddim(predict, X_T, sampling_timesteps(steps), scheduler.alphas_cumprod)
    assert error(ours, theirs) <= TOLERANCE
    late = ddim(predict, X_T, sampling_timesteps(steps) + 1, scheduler.alphas_cumprod)
    assert error(late, theirs) > 10 * TOLERANCE  # a step of the schedule would be seen


@pytest.mark.parametrize("spacing", SPACINGS)
def test_spacing(spacing):
    scheduler = ddim_scheduler(timestep_spacing=spacing)
    for steps in (2, 4, 10, 25, 50, 100):
        scheduler.set_timesteps(steps)
        assert sampling_timesteps(steps, spacing=spacing).tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_noise(eta):
    noise = torch.randn(20, *X_T.shape, generator=torch.Generator().manual_seed(1))
    scheduler = ddim_scheduler()
    theirs = run(scheduler, 20, eta=eta, variance_noise=lambda i: noise[i])
    alphas = scheduler.alphas_cumprod
    ours = ddim(predict, X_T, sampling_timesteps(20), alphas, eta=eta, noise=lambda i: noise[i])
    assert error(ours, theirs) <= TOLERANCE
    assert error(ddim(predict, X_T, sampling_timesteps(20), alphas), theirs) > 1e-2


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
def test_plms(steps):
    scheduler = PNDMScheduler(**SD, skip_prk_steps=True)
    theirs = run(scheduler, steps)
    ours = plms(predict, X_T, sampling_timesteps(steps), scheduler.alphas_cumprod)
    assert error(ours, theirs) <= TOLERANCE


def dpm_scheduler(steps: int, spacing: str = "leading", **options) -> DPMSolverMultistepScheduler:
    """Of order two in the midpoint form, at our timesteps; its own leading ones differ from DDIM's."""
    betas = {name: SD[name] for name in ("beta_schedule", "beta_start", "beta_end", "steps_offset")}
    scheduler = DPMSolverMultistepScheduler(
        **betas, euler_at_final=True, final_sigmas_type="sigma_min", **options
    )
    timesteps = sampling_timesteps(steps, spacing=spacing).tolist()
    scheduler.set_timesteps = lambda steps: DPMSolverMultistepScheduler.set_timesteps(
        scheduler, timesteps=timesteps
    )
    return scheduler


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 14, 15, 50])
@pytest.mark.parametrize("parameterization, name", [("eps", "epsilon"), ("v", "v_prediction")])
def test_dpm_solver_pp_2m(parameterization, name, steps, spacing):
    scheduler = dpm_scheduler(steps, spacing, prediction_type=name)
    alphas, timesteps = scheduler.alphas_cumprod, sampling_timesteps(steps, spacing=spacing)

    def eps(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return to_eps(parameterization, predict(x, t), x, t, alphas)

    theirs = run(scheduler, steps)
    assert error(dpm_solver_pp_2m(eps, X_T, timesteps, alphas), theirs) <= TOLERANCE
    if steps > 2:  # the order would be seen
        assert error(ddim(eps, X_T, timesteps, alphas), theirs) > 10 * TOLERANCE


def test_dpm_solver_pp_2m_over_a_picture():
    """The last six of fifteen steps, from a level of noise between."""
    scheduler = dpm_scheduler(15)
    scheduler.set_timesteps(15)
    timesteps = sampling_timesteps(15)[-6:]
    scheduler.set_begin_index(9)
    x = X_T
    for t in scheduler.timesteps[9:]:
        x = scheduler.step(predict(x, t.expand(len(x))), t, x).prev_sample
    assert error(dpm_solver_pp_2m(predict, X_T, timesteps, scheduler.alphas_cumprod), x) <= TOLERANCE


@pytest.mark.parametrize("parameterization, name", [("v", "v_prediction"), ("x0", "sample")])
def test_other_parameterizations(parameterization, name):
    scheduler = ddim_scheduler(prediction_type=name)
    alphas = scheduler.alphas_cumprod

    def eps(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return to_eps(parameterization, predict(x, t), x, t, alphas)

    theirs = run(scheduler, 25)
    assert error(ddim(eps, X_T, sampling_timesteps(25), alphas), theirs) <= TOLERANCE
    assert error(ddim(predict, X_T, sampling_timesteps(25), alphas), theirs) > 1e-2


@pytest.mark.parametrize("batched", [True, False])
def test_guidance(batched):
    """Guidance before or after the conversion from v to eps is the same."""
    scheduler = ddim_scheduler(prediction_type="v_prediction")
    alphas = scheduler.alphas_cumprod

    def guided_v(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        uncond, cond = network(x, t, UNCONDITIONAL), network(x, t, CONTEXT)
        return uncond + 7.5 * (cond - uncond)

    def eps(x: torch.Tensor, t: torch.Tensor, rows: list[int]) -> torch.Tensor:
        x, t = repeat_rows(x, len(rows)), repeat_rows(t, len(rows))
        return to_eps("v", network(x, t, torch.cat([UNCONDITIONAL, CONTEXT])[rows]), x, t, alphas)

    numbers = list(range(2 * len(X_T)))
    unconditional, prompts = numbers[: len(X_T)], numbers[len(X_T) :]
    guided_eps = classifier_free_guidance(eps, prompts, unconditional, 7.5, batched=batched)
    ours = ddim(guided_eps, X_T, sampling_timesteps(20), alphas)
    assert error(ours, run(scheduler, 20, guided_v)) <= TOLERANCE


@pytest.mark.parametrize("parameterization, name", [("v", "v_prediction"), ("x0", "sample")])
def test_zero_terminal_snr(parameterization, name):
    """Theirs divides by the last timestep's exact 0 nowhere; ours by 2^-12 in float32, which costs digits."""
    theirs = ddim_scheduler(prediction_type=name, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    alphas = make_alphas_cumprod(zero_terminal_snr=True)
    assert ends_in_noise(alphas) and not ends_in_noise(make_alphas_cumprod())
    torch.testing.assert_close(alphas, theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)

    def eps(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return to_eps(parameterization, predict(x, t), x, t, alphas)

    timesteps = sampling_timesteps(25, spacing="trailing")
    assert int(timesteps[0]) == 999
    assert error(ddim(eps, X_T, timesteps, alphas), run(theirs, 25)) <= 2e-3
    theirs = dpm_scheduler(25, "trailing", prediction_type=name, rescale_betas_zero_snr=True)
    assert error(dpm_solver_pp_2m(eps, X_T, timesteps, alphas), run(theirs, 25)) <= 2e-3
