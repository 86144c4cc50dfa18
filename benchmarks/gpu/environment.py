"""Parts `env` and `micro`: what the machine is, and which kernels are worth what."""

import os
import shutil
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.record import CUDA, DEVICE, HALF, attempt, milliseconds, say
from benchmarks.measure import machine
from benchmarks.timing import synchronize

PACKAGES = ("torch", "pytorch-lightning", "transformers", "diffusers", "omegaconf", "peft", "triton")
ATTENTION = ((4096, 40, 4096), (1024, 80, 1024), (256, 160, 256), (4096, 40, 77))  # cells, head width, keys
LEVELS = ((320, 64), (640, 32), (1280, 16), (1280, 8))  # channels, side: of SD 1.5 at 512 pixels
LAYOUTS = (torch.channels_last, torch.contiguous_format)


def env() -> None:
    """Versions, cores, shared memory, and what the device does at best."""
    figures: dict[str, object] = {"date": str(date.today()), "cpus": len(os.sched_getaffinity(0))}
    for name in PACKAGES:
        try:
            figures[name] = version(name)
        except PackageNotFoundError:
            figures[name] = "absent"
    if os.path.isdir("/dev/shm"):
        figures["shared_memory_mib"] = shutil.disk_usage("/dev/shm").free // 2**20
    if CUDA:
        q = torch.randn(2, 8, 64, 40, device=DEVICE, dtype=HALF)
        F.scaled_dot_product_attention(q, q, q)
        figures |= {"gpu": torch.cuda.get_device_name(), "cudnn": torch.backends.cudnn.version()}
        figures |= {"sdp_priority": str(torch._C._get_sdp_priority_order())}
    say("versions", **figures)
    flops, bandwidth = machine(DEVICE)
    say("at best", tflop_per_s=flops / 1e12, gb_per_s=bandwidth / 1e9)


def micro() -> None:
    """Attention, convolution and group norm at the shapes of SD 1.5; copies to a busy device."""
    fewer = slice(None) if CUDA else slice(-1, None)
    for cells, width, keys in ATTENTION[fewer]:
        _attention(cells, width, keys)
    for channels, side in LEVELS[fewer]:
        for layout in LAYOUTS:
            for tuned in (False, True) if CUDA else (False,):
                with attempt("convolution"):
                    _convolution(channels, side, layout, tuned=tuned)
        with attempt("group norm"):
            _group_norm(channels, side)
    if CUDA:
        _copies()


def _attention(cells: int, width: int, keys: int) -> None:
    shapes = (cells, keys, keys)
    q, k, v = (torch.randn(2, n, 8, width, device=DEVICE, dtype=HALF).transpose(1, 2) for n in shapes)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    about = {"cells": cells, "width": width, "stream_ids": keys}
    if CUDA:
        say("SDPA's choice", **about, choice=int(torch._fused_sdp_choice(q, k, v)))
    fast = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    for backend in fast if CUDA else (SDPBackend.MATH,):
        with attempt(f"SDPA {backend.name}"), sdpa_kernel(backend):
            gradient = torch.randn_like(F.scaled_dot_product_attention(q, k, v))

            def forward() -> torch.Tensor:
                return F.scaled_dot_product_attention(q, k, v)

            def both(g: torch.Tensor = gradient) -> tuple[torch.Tensor, ...]:
                return torch.autograd.grad(forward(), (q, k, v), g)

            ms = {"forward_ms": milliseconds(forward)[0], "both_ms": milliseconds(both)[0]}
            say(f"SDPA {backend.name}", **about, **ms)


def _convolution(channels: int, side: int, layout: torch.memory_format, *, tuned: bool) -> None:
    torch.backends.cudnn.benchmark = tuned
    conv = nn.Conv2d(channels, channels, 3, padding=1).to(DEVICE, HALF, memory_format=layout)
    x = torch.randn(2, channels, side, side, device=DEVICE, dtype=HALF)
    x = x.contiguous(memory_format=layout).requires_grad_()
    forward = milliseconds(lambda: conv(x))[0]
    both = milliseconds(lambda: conv(x).sum().backward())[0]
    torch.backends.cudnn.benchmark = False
    about = {"channels": channels, "side": side, "layout": str(layout).split(".")[1], "tuned": tuned}
    say("convolution", **about, forward_ms=forward, both_ms=both)


def _group_norm(channels: int, side: int) -> None:
    for autocast in (False, True):
        norm = nn.GroupNorm(32, channels).to(DEVICE, torch.float32 if autocast else HALF)
        x = torch.randn(2, channels, side, side, device=DEVICE, dtype=HALF)
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            kept = norm(x).is_contiguous(memory_format=torch.channels_last)
            ms = milliseconds(lambda norm=norm, x=x: F.silu(norm(x)))[0]
        about = {"channels": channels, "side": side, "autocast": autocast}
        say("group norm + SiLU", **about, ms=ms, channels_last_out=kept)


def _copies() -> None:
    """Whether the host waits for the queue when it copies a step's noise."""
    a, small = torch.randn(8192, 8192, device=DEVICE, dtype=HALF), torch.randn(2, 4, 64, 64)
    for name, tensor in (("pageable", small), ("pinned", small.pin_memory())):
        say("copy behind a full queue", memory=name, host_ms=copy_behind(lambda: a @ a, 30, tensor))


def copy_behind(work: Callable[[], object], times: int, tensor: torch.Tensor) -> float:
    """ms until the host has asked for a tensor's copy, while so many calls of work are in the queue."""
    work()
    tensor.to(DEVICE, non_blocking=True)  # the allocator has memory for both from now on
    synchronize(DEVICE)
    for _ in range(times):
        work()
    start = time.perf_counter()
    tensor.to(DEVICE, non_blocking=True)
    asked = time.perf_counter() - start
    synchronize(DEVICE)
    return 1000 * asked
