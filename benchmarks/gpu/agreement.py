"""Parts `agree` and `graph`: the GPU computes what the CPU does, twice the same, and in one CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.gpu.record import (
    CUDA,
    DEVICE,
    SIZE,
    attempt,
    chosen,
    forget_peak,
    memory,
    milliseconds,
    profiled,
    say,
)
from benchmarks.ours import Batches, Training, build, case_params
from benchmarks.timing import synchronize
from ldm.optim.optimizer_nodes import FUSED_BACKWARD
from ldm.training.latent_diffusion import LatentDiffusion

SMALL = Case("storybook", "train", 4, text=True)


def agree(*words: str) -> None:
    """The same losses and gradients on the CPU and here; equal steps twice; lean steps; adamw_bf16."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    loss, gradient = _graded("cpu", autocast=False)
    ways: dict[str, dict[str, Any]] = {
        "float32": {"autocast": False},
        "bf16-mixed": {"autocast": True},
        "bf16 weights": {"autocast": False, "optimizer": "adamw_bf16"},
    }
    for name, way in ways.items():
        if not chosen(name, words):
            continue
        with attempt(f"the CPU's loss and gradient, {name}"):
            here, there = _graded(DEVICE, **way)
            apart = {"loss": _relative(here, loss), "gradient": _relative(there, gradient)}
            say(f"the CPU's loss and gradient, {name}", **apart)
    if not chosen("four steps", words):
        return
    with attempt("four steps"):
        plain = _trained()
        _compare("four steps, twice", plain, _trained())
        _compare("four steps, in the backward pass", plain, _trained(optimizer=_lean("adamw")))
        bf16 = [_trained(optimizer=name) for name in ("adamw_bf16", _lean("adamw_bf16"))]
        _compare("four steps of adamw_bf16, in the backward pass", *bf16)
        torch.use_deterministic_algorithms(True, warn_only=True)
        _compare("four steps, twice, deterministic algorithms", _trained(), _trained())
        torch.use_deterministic_algorithms(False)


def _lean(name: str) -> dict:
    """The node of a fused backward pass."""
    return {"target": FUSED_BACKWARD, "params": {"optimizer": name}}


def _graded(device: str, *, autocast: bool, **more: object) -> tuple[Tensor, Tensor]:
    """Losses of a batch and the gradient of their mean, float64 on the CPU."""
    module = build(case_params(SMALL) | more).to(device).train()
    batch = _on(device, module, Batches(module, size=SMALL.size, batch=SMALL.batch)[0])
    with torch.autocast(device, torch.bfloat16, enabled=autocast, cache_enabled=False):
        losses = module.loss_per_item(batch)
    losses.mean().backward()
    gradients = [p.grad.flatten().cpu().double() for p in module.parameters() if p.grad is not None]
    return losses.detach().cpu().double(), torch.cat(gradients)


def _on(device: str, module: LatentDiffusion, batch: dict) -> dict:
    """A batch as the Trainer hands it over."""
    prepared = module.on_before_batch_transfer(batch, 0)
    return module.transfer_batch_to_device(prepared, torch.device(device), 0)


def _trained(**more: object) -> list[Tensor]:
    """The UNet after four steps."""
    params = case_params(SMALL) | {"trainable": {"text_encoder": True, "learning_rate": 1e-4}} | more
    training = Training(
        params, size=SMALL.size, batch=SMALL.batch, device=DEVICE, precision="32-true", clip=None
    )
    training.serve(iter([4]), lambda seconds: synchronize(DEVICE))
    return [p.detach().cpu().double() for p in training.module.networks["unet"].parameters()]


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def _compare(what: str, a: list[Tensor], b: list[Tensor]) -> None:
    equal = all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    say(what, equal=equal, largest=max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True)))


def graph() -> None:
    """What the same eager kernels take as one CUDA graph, weights float32 under autocast or bfloat16."""
    if not CUDA:
        say("a step as one CUDA graph", skipped="needs CUDA")
        return
    for dtype in (torch.float32, torch.bfloat16):
        with attempt(f"a step as one CUDA graph, {dtype}"):
            _captured(f"a step as one CUDA graph, {dtype}", dtype)


def losses_of(module: LatentDiffusion, batch: dict) -> Callable[[], Tensor]:
    """`loss_per_item` of different captions -> [B], without copies from the host, which no capture takes."""
    ids = module.conditioner.ids_of(batch["caption"])

    def losses() -> Tensor:
        encoding = module.cond_stage_model.encode(ids)
        return module.losses(batch, module.conditioner.conditioning(encoding, None))

    return losses


def _captured(what: str, dtype: torch.dtype) -> None:
    case = Case(SIZE, "train", 2, text=True)
    module = build(case_params(case), device=DEVICE).train()
    batch = _on(DEVICE, module, Batches(module, size=SIZE, batch=2)[0])
    learning = [p.data for p in ()]
    for name in ("unet", "text_encoder"):
        learning += list(module.networks[name].to(dtype).parameters())
    optimizer = torch.optim.AdamW(learning, lr=1e-6, fused=True, capturable=True)
    losses = losses_of(module, batch)
    forget_peak()

    def step() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.float32, cache_enabled=False):
            loss = losses().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(11):
            optimizer.zero_grad(set_to_none=True)
            before = step()
    torch.cuda.current_stream().wait_stream(stream)
    optimizer.zero_grad(set_to_none=True)
    whole = torch.cuda.CUDAGraph()
    with torch.cuda.graph(whole):
        after = step()
    replay: Callable[[], None] = whole.replay
    ms = milliseconds(replay)[0]
    say(what, ms=ms, loss_before=float(before), loss_after=float(after), **memory())
    with profiled(what, 3):
        for _ in range(3):
            replay()
