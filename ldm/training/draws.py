"""The random numbers of training: each is a function of (seed, item, part, purpose), in any batch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm import randomness


def item_keys(batch: dict) -> list[tuple[int, str]]:
    """(item number, part) of each item of a batch: what names its draws."""
    parts = ("prior" if prior else "subject" for prior in batch["is_prior"].tolist())
    return list(zip(batch["item"].tolist(), parts, strict=True))


class ItemDraws:
    """The random draws of a batch, each a function of (seed, item number, part, purpose), made on the CPU."""

    def __init__(self, seed: int, keys: Sequence[tuple[int, str]], *, device: torch.device):
        self.seed, self.keys, self.device = seed, keys, device

    def randn(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard normal [B, *shape]."""
        return self._each(lambda g: torch.randn(tuple(shape), generator=g), purpose)

    def randint(self, purpose: str, high: int) -> Tensor:
        """Uniform integers in [0, high), [B]."""
        return self._each(lambda g: torch.randint(high, (), generator=g), purpose)

    def _each(self, draw: Callable[[torch.Generator], Tensor], purpose: str) -> Tensor:
        draws = [draw(randomness.generator(self.seed, k, f"{part}/{purpose}")) for k, part in self.keys]
        return torch.stack(draws).to(self.device, non_blocking=True)
