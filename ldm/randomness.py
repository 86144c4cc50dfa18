"""Randomness by item: every draw is a function of (run seed, item number, purpose) alone.

Nothing here keeps state, so a resumed, re-batched or distributed run draws exactly what an
uninterrupted run on one process would have drawn, and a GPU run sees the same draws as a CPU run.
"""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def generator(seed: int, item: int, purpose: str) -> torch.Generator:
    """CPU generator of one draw. `purpose` names it ("noise", "timestep", "flip", ...)."""
    digest = hashlib.blake2b(f"{seed}/{item}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def randn(shape: Sequence[int], *, seed: int, items: Iterable[int], purpose: str) -> Tensor:
    """Standard normal noise, one independent draw per item -> [B, *shape] float32 on the CPU."""
    return torch.stack([torch.randn(tuple(shape), generator=generator(seed, k, purpose)) for k in items])


def randint(high: int, *, seed: int, items: Iterable[int], purpose: str) -> Tensor:
    """Uniform integers in [0, high), one per item -> [B] int64 on the CPU."""
    return torch.stack([torch.randint(high, (), generator=generator(seed, k, purpose)) for k in items])


def rand(*, seed: int, items: Iterable[int], purpose: str) -> Tensor:
    """Uniform numbers in [0, 1), one per item -> [B] float32 on the CPU."""
    return torch.stack([torch.rand((), generator=generator(seed, k, purpose)) for k in items])
