"""Counter-based random numbers: each is a function of (run seed, item number, purpose) alone.

There is no generator state, so a resumed, re-batched or distributed run gets the same random numbers as an
uninterrupted run in one process, and a GPU run the same as a CPU run.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def generator(seed: int, item: int, purpose: str) -> torch.Generator:
    """CPU generator for one purpose ("noise", "timestep", "flip", ...) of one item."""
    digest = hashlib.blake2b(f"{seed}/{item}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def randn(shape: Sequence[int], *, seed: int, items: Iterable[int], purpose: str) -> Tensor:
    """Standard normal noise, independent for each item -> [B, *shape] float32 on the CPU."""
    return torch.stack([torch.randn(tuple(shape), generator=generator(seed, k, purpose)) for k in items])


def randint(high: int, *, seed: int, items: Iterable[int], purpose: str) -> Tensor:
    """Uniform integers in [0, high), one per item -> [B] int64 on the CPU."""
    return torch.stack([torch.randint(high, (), generator=generator(seed, k, purpose)) for k in items])


def rand(*, seed: int, items: Iterable[int], purpose: str) -> Tensor:
    """Uniform numbers in [0, 1), one per item -> [B] float32 on the CPU."""
    return torch.stack([torch.rand((), generator=generator(seed, k, purpose)) for k in items])


StreamIds = Sequence[tuple[int, str]]  # (item number, part) of each item of a batch: what names its draws


def stream_ids(batch: dict) -> list[tuple[int, str]]:
    """(item number, stream) of each item of a batch, which identify its random numbers."""
    return list(zip(batch["item"].tolist(), batch["stream"], strict=True))


class ItemRNG:
    """Random numbers of a batch, each a function of (seed, item number, stream, purpose), on the device."""

    def __init__(self, seed: int, ids: StreamIds):
        self.seed = seed
        self.stream_ids = ids

    def randn(self, purpose: str, out: Tensor) -> None:
        """Fills `out` [B, ...] with standard normal noise."""
        self._each(purpose, lambda row, g: torch.randn(row.shape, generator=g, out=row), out)

    def randint(self, purpose: str, high: int, out: Tensor) -> None:
        """Fills `out` [B] with uniform integers in [0, high)."""
        self._each(purpose, lambda row, g: torch.randint(high, row.shape, generator=g, out=row), out)

    def _each(self, purpose: str, fill: Callable[[Tensor, torch.Generator], Tensor], out: Tensor) -> None:
        for row, (item, stream) in zip(out, self.stream_ids, strict=True):
            fill(row, generator(self.seed, item, f"{stream}/{purpose}"))
