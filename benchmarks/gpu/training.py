"""Parts `train`, `compiled`, `caps` and `optimizer`: steps of training in Lightning's own loop."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case, model_params, pixels
from benchmarks.gpu.record import (
    CUDA,
    DEVICE,
    ROOT,
    SIZE,
    STEPS,
    WARM,
    attempt,
    chosen,
    forget_peak,
    memory,
    milliseconds,
    profiled,
    say,
)
from benchmarks.gpu.runs import SUBJECT, TEXT_WORDS
from benchmarks.ours import Training, build, case_params
from benchmarks.timing import synchronize
from ldm.data.latents import cached_latent_stats
from ldm.engine.device import set_matmul_precision
from ldm.optim.optimizers import build_optimizer
from ldm.runs.memory import encoding, estimate
from ldm.runs.options import parse
from ldm.schema import RunConfig

FULL = Case(SIZE, "train", 2, text=True)
PRESETS = ("24gb", "16gb", "12gb", "8gb-lora")
# GiB, less the CUDA context and a display
CARDS = {"24gb": 22.5, "16gb": 14.5, "12gb": 10.5, "8gb-lora": 6.7}


def preset(*names: str, **changed: object) -> Training:
    """The shipped config with presets, as main.py reads it, at a batch of 1 + 1."""
    config = _config(*names)
    params: dict[str, Any] = config.model["params"] | {"compile": None} | changed
    precision, clip = config.trainer.precision, config.trainer.gradient_clip_val
    return Training(params, size=SIZE, batch=2, device=DEVICE, precision=precision, clip=clip)


def _config(*presets: str) -> RunConfig:
    """Of the size that is checked, with any photos; SD 1.5 gets a vocabulary that is in the repository."""
    shipped = "dreambooth-sd1" if SIZE == "sd1" else "dreambooth"
    files = [f"{ROOT}/configs/{name}.yaml" for name in (shipped, *(f"presets/{name}" for name in presets))]
    words = [f"--data_root={SUBJECT}", "--class_word=dog", *(TEXT_WORDS if SIZE == "sd1" else [])]
    return parse(["--base", *files, *words])


def measure(what: str, training: Training, *, steps: int = STEPS, profile: bool = False) -> None:
    """Says ms of a step and the peaks of memory."""
    figures: dict[str, float] = {}
    seconds: list[float] = []

    def counts() -> Iterator[int]:
        yield WARM
        forget_peak()
        yield 1  # the allocator's cache is filled again
        yield steps
        figures.update(memory())
        if profile:
            with profiled(what, WARM):
                yield WARM

    training.serve(counts(), seconds.append)
    say(what, ms=1000 * seconds[2] / steps, batch=len(training.batches.latent_stats), **figures)


def train(*words: str) -> None:
    """Steps in eager mode: the shipped config, the presets, a larger batch; where their time goes."""
    set_matmul_precision("high")
    params = case_params(FULL)

    def made(batch: int = 2, *, cuda_graph: bool | None = None, **more: Any) -> Training:
        changed = {"compile": None, "cuda_graph": cuda_graph}
        return Training(params | changed, size=SIZE, batch=batch, device=DEVICE, **more)

    def to_bf16(module: nn.Module) -> None:
        for part in ("unet", "text_encoder"):
            module.networks[part].to(torch.bfloat16)

    cases: dict[str, Callable[[], Training]] = {
        "1+1, full": made,
        "1+1, full, kernel by kernel": lambda: made(cuda_graph=False),
        "1+1, full, cudnn.benchmark": made,
        "1+1, LoRA": lambda: Training.of_case(Case(SIZE, "train", 2, lora=True), device=DEVICE),
        "1+1, shipped config": preset,
        **{f"1+1, preset {name}": lambda name=name: preset(name) for name in PRESETS},
        "1+1, lean": lambda: Training.of_case(Case(SIZE, "train", 2, text=True, lean=True), device=DEVICE),
        "4+4, full": lambda: made(8),
        "1+1, bf16 weights, no clipping": lambda: made(precision="32-true", clip=None, prepare=to_bf16),
    }
    for name, make in cases.items():
        if not chosen(name, words):
            continue
        with attempt(name):
            torch.backends.cudnn.benchmark = "benchmark" in name
            steps = max(STEPS // 4, 1) if "12gb" in name or "16gb" in name else STEPS
            measure(name, make(), steps=steps, profile=name.endswith("full"))


def compiled(*words: str) -> None:
    """The UNet compiled: the same loss, how long the first step takes, and then."""
    set_matmul_precision("high")
    for mode in ("default", "reduce-overhead") if CUDA else ("default",):
        if not chosen(mode, words):
            continue
        with attempt(f"compiled {mode}"):
            _compiled(mode)


def _compiled(mode: str) -> None:
    training = Training.of_case(FULL, device=DEVICE, compiled=mode)
    module = training.module
    batch = module.transfer_batch_to_device(
        module.on_before_batch_transfer(training.batches[0], 0), torch.device(DEVICE), 0
    )

    def loss() -> float:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=CUDA, cache_enabled=False):
            return float(module.loss_per_item(batch).mean())

    with torch.compiler.set_stance("force_eager"):
        eager = loss()
    first = milliseconds(loss, 1, 0)[0] / 1000
    say(f"compiled {mode}", first_forward_s=first, eager_loss=eager, compiled_loss=loss())
    measure(f"compiled {mode}, 1+1, full", training, profile=True)


def caps(*words: str) -> None:
    """Do the presets fit the cards that they are named after? The allocator is held to so much."""
    total = torch.cuda.get_device_properties(0).total_memory if CUDA else 0
    for name, gib in CARDS.items():
        if not chosen(name, words):
            continue
        if CUDA:
            torch.cuda.set_per_process_memory_fraction(gib * 2**30 / total)
        forecasts: dict[str, float] = {}
        with attempt(f"preset {name}: forecast"):
            forecasts = forecast(name)
        for what, work in FITTED.items():
            about = {"card_gib": gib} | ({"forecast_gib": forecasts[what]} if forecasts else {})
            with attempt(f"preset {name}: {what}"):
                work(name)
                say(f"preset {name}: {what}", fits=True, **memory(), **about)


def _train_in(name: str) -> None:
    training = preset(name)
    forget_peak()
    training.serve(iter([WARM]), lambda seconds: synchronize(DEVICE))


def _encode_in(name: str) -> None:
    module = preset(name).module
    forget_peak()
    views = {str(k): lambda: torch.rand(3, pixels(SIZE), pixels(SIZE)) for k in range(8)}
    cached_latent_stats(views, module.encode_images, vae_hash="")


FITTED = {"training": _train_in, "encoding 8 images": _encode_in}


def forecast(name: str) -> dict[str, float]:
    """GiB of the device while a preset trains and while it encodes, as `main.py --dry_run` computes them."""
    config = _config(name)
    needs, _ = estimate(config)
    found = sum(need.total for need in needs.values()), encoding(config)
    return {what: size / 2**30 for what, size in zip(FITTED, found, strict=True)}


def optimizer() -> None:
    """AdamW's ways over the weights of UNet and text encoder."""
    module = build(model_params(SIZE), device="meta")
    shapes = [p.shape for name in ("unet", "text_encoder") for p in module.networks[name].parameters()]
    fp32, bf16 = torch.float32, torch.bfloat16
    for name, dtype, fused in (("adamw", fp32, True), ("adamw", fp32, False), ("adamw_bf16", bf16, True)):
        with attempt(f"{name}, fused {fused}"):
            _step(name, [torch.zeros(shape, device=DEVICE, dtype=dtype) for shape in shapes], fused=fused)


def _step(name: str, weights: list[Tensor], *, fused: bool) -> None:
    holder = nn.ParameterList(weights)
    stepper = build_optimizer({"all": (holder, 1e-6)}, name, fused=fused)
    for parameter in holder:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    ms, host = milliseconds(stepper.step, min(5, STEPS), 1)
    count = sum(parameter.numel() for parameter in holder)
    say(f"{name}, fused {fused}", ms=ms, host_ms=host, weights=count)
    if fused and name == "adamw":
        ms, host = milliseconds(lambda: nn.utils.clip_grad_norm_(list(holder), 1.0), min(5, STEPS), 1)
        say("clipping by the norm, a pass of its own", ms=ms, host_ms=host)
