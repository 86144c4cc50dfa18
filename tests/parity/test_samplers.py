"""Whole trajectories against diffusers' schedulers with Stable Diffusion's settings, float32."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import scheduling_euler_ancestral_discrete

from ldm.diffusion.guidance import classifier_free_guidance
from ldm.diffusion.process import CLEAN, DiscreteDiffusion, Level
from ldm.diffusion.samplers import (
    ddim,
    dpm_solver_pp_2m,
    dpm_solver_pp_2m_sde,
    euler,
    euler_a,
    heun,
    plms,
    unipc,
)
from ldm.diffusion.schedule import make_alphas_cumprod, sampling_timesteps
from ldm.models.attention import repeat_batch

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
SD = BETAS | {"set_alpha_to_one": False}
ON_TIMESTEPS = ("leading", "trailing", "linspace")
PREDICTIONS = [("eps", "epsilon"), ("v", "v_prediction")]
DRAW = torch.Generator().manual_seed(0)
X_T = torch.randn(2, 4, 8, 8, generator=DRAW)
CONTEXT, UNCONDITIONAL = torch.randn(2, 2, 5, 4, generator=DRAW)
KERNEL = torch.randn(4, 4, 3, 3, generator=DRAW) / 6
STEP_NOISE = torch.randn(50, *X_T.shape, generator=DRAW)
TOLERANCE = 1e-5

Model = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def network(x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """Bounded, not linear, and dependent on all of its inputs."""
    shift = context.mean(dim=1)[:, :, None, None] + torch.sin(t / 100)[:, None, None, None]
    return torch.tanh(torch.nn.functional.conv2d(x, KERNEL, padding=1) + shift) + 0.5 * x


def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return network(x, t, CONTEXT)


def process_of(scheduler: SchedulerMixin) -> DiscreteDiffusion:
    """Of the same betas, and of the same prediction."""
    names = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
    return DiscreteDiffusion(
        scheduler.alphas_cumprod, parameterization=names[scheduler.config.prediction_type]
    )


def denoiser(
    process: DiscreteDiffusion, model: Model = predict
) -> Callable[[torch.Tensor, Level], torch.Tensor]:
    def denoise(x: torch.Tensor, level: Level) -> torch.Tensor:
        return process.denoised(model(x, torch.full((len(x),), level.t)), x, level)

    return denoise


def run(scheduler: SchedulerMixin, steps: int, model: Model = predict, **step_options) -> torch.Tensor:
    """The loop of a diffusers pipeline."""
    scheduler.set_timesteps(steps)
    x = X_T
    for i, t in enumerate(scheduler.timesteps):
        options = {name: option(i) if callable(option) else option for name, option in step_options.items()}
        x = scheduler.step(model(x, t.expand(len(x))), int(t), x, **options).prev_sample
    return x


def run_scaled(scheduler: SchedulerMixin, steps: int) -> torch.Tensor:
    """The same for schedulers whose x is ours divided by a: from X_T to an end without noise."""
    scheduler.set_timesteps(steps)
    x = X_T * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
    for t in scheduler.timesteps:
        prediction = predict(scheduler.scale_model_input(x, t), t.expand(len(x)))
        x = scheduler.step(prediction, t, x).prev_sample
    return x


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def ddim_scheduler(**options) -> DDIMScheduler:
    return DDIMScheduler(**SD, clip_sample=False, **options)


@pytest.mark.parametrize("steps", [1, 7, 30, 50])
def test_ddim(steps):
    scheduler = ddim_scheduler()
    theirs, process = run(scheduler, steps), process_of(scheduler)
    levels = process.levels(steps, "leading")
    assert [level.t for level in levels[:-1]] == scheduler.timesteps.tolist()
    assert error(ddim(denoiser(process), X_T, levels), theirs) <= TOLERANCE
    late = [*(process.level(int(level.t) + 1) for level in levels[:-1]), levels[-1]]
    assert error(ddim(denoiser(process), X_T, late), theirs) > 10 * TOLERANCE  # a step would be seen


@pytest.mark.parametrize("spacing", ON_TIMESTEPS)
def test_spacing(spacing):
    scheduler = ddim_scheduler(timestep_spacing=spacing)
    for steps in (*range(2, 48), 100):
        scheduler.set_timesteps(steps)
        assert sampling_timesteps(steps, spacing=spacing).tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("steps", [2, 5, 25])
def test_karras_levels(steps):
    """EulerDiscreteScheduler with use_karras_sigmas: their ratios, and their timesteps between timesteps."""
    scheduler = EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True)
    scheduler.set_timesteps(steps)
    levels = process_of(scheduler).levels(steps, "karras")
    torch.testing.assert_close(torch.tensor([level.s / level.a for level in levels]), scheduler.sigmas)
    ours = torch.tensor([level.t for level in levels[:-1]])
    torch.testing.assert_close(ours, scheduler.timesteps.float(), atol=2e-3, rtol=1e-5)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_noise(eta):
    scheduler = ddim_scheduler()
    theirs = run(scheduler, 20, eta=eta, variance_noise=lambda i: STEP_NOISE[i])
    process = process_of(scheduler)
    denoise, levels = denoiser(process), process.levels(20, "leading")
    ours = ddim(denoise, X_T, levels, eta=eta, noise=lambda i: STEP_NOISE[i])
    assert error(ours, theirs) <= TOLERANCE
    assert error(ddim(denoise, X_T, levels), theirs) > 1e-2


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
def test_plms(steps):
    scheduler = PNDMScheduler(**SD, skip_prk_steps=True)
    theirs, process = run(scheduler, steps), process_of(scheduler)
    assert error(plms(denoiser(process), X_T, process.levels(steps, "leading")), theirs) <= TOLERANCE


def dpm_scheduler(steps: int, spacing: str = "leading", **options) -> DPMSolverMultistepScheduler:
    """Of order two in the midpoint form, at our timesteps; its own leading ones differ from DDIM's."""
    options = {"final_sigmas_type": "sigma_min"} | options
    scheduler = DPMSolverMultistepScheduler(**BETAS, euler_at_final=True, **options)
    timesteps = sampling_timesteps(steps, spacing=spacing).tolist()
    scheduler.set_timesteps = lambda steps: DPMSolverMultistepScheduler.set_timesteps(
        scheduler, timesteps=timesteps
    )
    return scheduler


@pytest.mark.parametrize("spacing", ON_TIMESTEPS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 14, 15, 50])
@pytest.mark.parametrize("parameterization, name", PREDICTIONS)
def test_dpm_solver_pp_2m(parameterization, name, steps, spacing):
    scheduler = dpm_scheduler(steps, spacing, prediction_type=name)
    process = process_of(scheduler)
    denoise, levels = denoiser(process), process.levels(steps, spacing)
    theirs = run(scheduler, steps)
    assert error(dpm_solver_pp_2m(denoise, X_T, levels), theirs) <= TOLERANCE
    if steps > 2:  # the order would be seen
        assert error(ddim(denoise, X_T, levels), theirs) > 10 * TOLERANCE


def test_dpm_solver_pp_2m_over_a_picture():
    """The last six of fifteen steps, from a level of noise between."""
    scheduler = dpm_scheduler(15)
    scheduler.set_timesteps(15)
    scheduler.set_begin_index(9)
    x = X_T
    for t in scheduler.timesteps[9:]:
        x = scheduler.step(predict(x, t.expand(len(x))), t, x).prev_sample
    process = process_of(scheduler)
    levels = process.levels(15, "leading")[-7:]
    assert error(dpm_solver_pp_2m(denoiser(process), X_T, levels), x) <= TOLERANCE


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 3, 20])
@pytest.mark.parametrize("parameterization, name", PREDICTIONS)
def test_dpm_solver_pp_2m_sde(parameterization, name, steps, spacing):
    """algorithm_type sde-dpmsolver++ in the midpoint form, final_sigmas_type zero, with our noise."""
    options = {"algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "zero", "prediction_type": name}
    scheduler = dpm_scheduler(steps, spacing, **options)
    process = process_of(scheduler)
    denoise, levels = denoiser(process), process.levels(steps, spacing, clean=True)
    theirs = run(scheduler, steps, variance_noise=lambda i: STEP_NOISE[i])
    ours = dpm_solver_pp_2m_sde(denoise, X_T, levels, noise=lambda i: STEP_NOISE[i])
    assert error(ours, theirs) <= TOLERANCE
    if steps > 1:
        assert error(dpm_solver_pp_2m(denoise, X_T, levels), theirs) > 1e-2


@pytest.mark.parametrize(
    "spacing, steps", [*product(["leading", "trailing"], [1, 3, 20]), ("karras", 3), ("karras", 20)]
)
@pytest.mark.parametrize("parameterization, name", PREDICTIONS)
@pytest.mark.parametrize(
    "sampler, kind", [(euler, EulerDiscreteScheduler), (heun, HeunDiscreteScheduler)], ids=["euler", "heun"]
)
def test_samplers_of_karras(sampler, kind, parameterization, name, steps, spacing):
    """timestep_spacing as ours, or use_karras_sigmas; an end without noise (final_sigmas_type zero).

    Heun's scheduler takes Karras' ends from its own timesteps, "linspace" of which are those of the schedule;
    both interpolate timesteps from float32 ratios, which is why the network is told ours.
    """
    karras = spacing == "karras"
    own = (
        {"use_karras_sigmas": True, "timestep_spacing": "linspace"}
        if karras
        else {"timestep_spacing": spacing}
    )
    scheduler = kind(**BETAS, prediction_type=name, **own)
    process = process_of(scheduler)
    denoise, levels = denoiser(process), process.levels(steps, spacing, clean=True)
    theirs = run_scaled(scheduler, steps)
    assert levels[-1] == CLEAN
    assert error(sampler(denoise, X_T, levels), theirs) <= (1e-4 if karras else TOLERANCE)
    if steps > 1 and sampler is heun:
        assert error(euler(denoise, X_T, levels), theirs) > 1e-3


DPM, SDE = {"algorithm_type": "dpmsolver++"}, {"algorithm_type": "sde-dpmsolver++"}


@pytest.mark.parametrize("steps", [1, 3, 20])
@pytest.mark.parametrize("parameterization, name", PREDICTIONS)
@pytest.mark.parametrize(
    "sampler, kind, options",
    [
        (dpm_solver_pp_2m, DPMSolverMultistepScheduler, {**DPM, "euler_at_final": True}),
        (dpm_solver_pp_2m_sde, DPMSolverMultistepScheduler, {**SDE, "euler_at_final": True}),
        (unipc, UniPCMultistepScheduler, {}),
    ],
    ids=["dpm++2m", "dpm++2m_sde", "unipc"],
)
def test_solvers_at_karras_levels(sampler, kind, options, parameterization, name, steps):
    """use_karras_sigmas, final_sigmas_type zero; the network is told our timesteps, theirs are rounded."""
    about = {"use_karras_sigmas": True, "final_sigmas_type": "zero", "prediction_type": name}
    scheduler = kind(**BETAS, **about, **options)
    process, noise = process_of(scheduler), {}
    levels = process.levels(steps, "karras")
    scheduler.set_timesteps(steps)
    x = X_T
    for i, t in enumerate(scheduler.timesteps):
        if sampler is dpm_solver_pp_2m_sde:
            noise = {"variance_noise": STEP_NOISE[i]}
        prediction = predict(x, torch.full((len(x),), levels[i].t))
        x = scheduler.step(prediction, t, x, **noise).prev_sample
    found = sampler(denoiser(process), X_T, levels, noise=lambda i: STEP_NOISE[i])
    assert error(found, x) <= TOLERANCE
    if steps > 2:
        assert error(euler(denoiser(process), X_T, levels), x) > 10 * TOLERANCE


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 3, 20])
@pytest.mark.parametrize("parameterization, name", PREDICTIONS)
def test_euler_a(parameterization, name, steps, spacing, monkeypatch):
    """timestep_spacing as ours, with our noise in the place of theirs."""
    noise = iter(STEP_NOISE)
    monkeypatch.setattr(scheduling_euler_ancestral_discrete, "randn_tensor", lambda *_, **__: next(noise))
    scheduler = EulerAncestralDiscreteScheduler(**BETAS, prediction_type=name, timestep_spacing=spacing)
    process = process_of(scheduler)
    denoise, levels = denoiser(process), process.levels(steps, spacing, clean=True)
    theirs = run_scaled(scheduler, steps)
    assert error(euler_a(denoise, X_T, levels, noise=lambda i: STEP_NOISE[i]), theirs) <= TOLERANCE
    if steps > 1:
        assert error(euler(denoise, X_T, levels), theirs) > 1e-2


@pytest.mark.parametrize("clean, end", [(True, "zero"), (False, "sigma_min")])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 50])
@pytest.mark.parametrize("parameterization, name", PREDICTIONS)
def test_unipc(parameterization, name, steps, clean, end):
    """solver_order 2, solver_type bh2, predict_x0, lower_order_final: the defaults; trailing timesteps."""
    scheduler = UniPCMultistepScheduler(
        **BETAS, prediction_type=name, timestep_spacing="trailing", final_sigmas_type=end
    )
    process = process_of(scheduler)
    denoise, levels = denoiser(process), process.levels(steps, "trailing", clean=clean)
    theirs = run(scheduler, steps)
    assert error(unipc(denoise, X_T, levels), theirs) <= TOLERANCE
    if steps > 2:  # the corrector would be seen
        assert error(dpm_solver_pp_2m(denoise, X_T, levels), theirs) > 10 * TOLERANCE


@pytest.mark.parametrize("parameterization, name", [("v", "v_prediction"), ("x0", "sample")])
def test_other_parameterizations(parameterization, name):
    scheduler = ddim_scheduler(prediction_type=name)
    theirs, process = run(scheduler, 25), process_of(scheduler)
    levels = process.levels(25, "leading")
    assert error(ddim(denoiser(process), X_T, levels), theirs) <= TOLERANCE
    as_eps = DiscreteDiffusion(scheduler.alphas_cumprod)
    assert error(ddim(denoiser(as_eps), X_T, levels), theirs) > 1e-2


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("parameterization, name", PREDICTIONS)
def test_guidance(parameterization, name, batched):
    """Guidance of the prediction, before it is converted, or of what is denoised is the same."""
    scheduler = ddim_scheduler(prediction_type=name)
    process = process_of(scheduler)

    def guided(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        uncond, cond = network(x, t, UNCONDITIONAL), network(x, t, CONTEXT)
        return uncond + 7.5 * (cond - uncond)

    def denoise(x: torch.Tensor, level: Level, rows: list[int]) -> torch.Tensor:
        x = repeat_batch(x, len(rows))
        contexts = torch.cat([UNCONDITIONAL, CONTEXT])[rows]
        return process.denoised(network(x, torch.full((len(x),), level.t), contexts), x, level)

    numbers = list(range(2 * len(X_T)))
    unconditional, prompts = numbers[: len(X_T)], numbers[len(X_T) :]
    ours = classifier_free_guidance(denoise, prompts, unconditional, 7.5, batched=batched)
    assert error(ddim(ours, X_T, process.levels(20, "leading")), run(scheduler, 20, guided)) <= TOLERANCE


@pytest.mark.parametrize("parameterization, name", [("v", "v_prediction"), ("x0", "sample")])
def test_zero_terminal_snr(parameterization, name):
    """With their alphas_cumprod, of which DDIM's last is 0 and that of the others 2^-24, as ours."""
    options = {"prediction_type": name, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    alphas = make_alphas_cumprod(zero_terminal_snr=True)
    for sampler, theirs in [
        (ddim, ddim_scheduler(**options)),
        (dpm_solver_pp_2m, dpm_scheduler(25, "trailing", prediction_type=name, rescale_betas_zero_snr=True)),
        (unipc, UniPCMultistepScheduler(**BETAS, **options, final_sigmas_type="sigma_min")),
    ]:
        torch.testing.assert_close(alphas, theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)  # theirs: float32
        process = process_of(theirs)
        levels = process.levels(25, "trailing")
        assert levels[0].t == 999 and process.zero_terminal_snr
        assert error(sampler(denoiser(process), X_T, levels), run(theirs, 25)) <= TOLERANCE
