"""What the UNet is told besides latents and timestep: its items' prompts, and a vector of each item."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

KeysValues = Mapping[nn.Module, tuple[Tensor, Tensor]]  # of each cross-attention, [B, heads, M, c] both


class TextEncoding(NamedTuple):
    """What a text encoder makes of P prompts: the context [P, M, D] of their tokens.

    pooled: [P, V], of each prompt as a whole, from encoders that give it.
    """

    context: Tensor
    pooled: Tensor | None = None

    @classmethod
    def cat(cls, encodings: Sequence[Self]) -> Self:
        """Those of several lists of prompts, one after the other."""
        pooled = [one.pooled for one in encodings if one.pooled is not None]
        return cls(torch.cat([one.context for one in encodings]), torch.cat(pooled) if pooled else None)

    def split(self, sizes: Sequence[int]) -> list[Self]:
        """The reverse of `cat`. sizes: how many prompts each has."""
        contexts = self.context.split(list(sizes))
        pooled = [None] * len(sizes) if self.pooled is None else self.pooled.split(list(sizes))
        return [type(self)(*pair) for pair in zip(contexts, pooled, strict=True)]

    def select(self, prompt_index: Sequence[int]) -> Self:
        """Of B items; prompt_index: [B], which of the P prompts each has."""
        index = index_tensor(prompt_index, self.context.device)
        pooled = None if self.pooled is None else self.pooled.index_select(0, index)
        return type(self)(self.context.index_select(0, index), pooled)

    def joined(self) -> Self:
        """N chunks of one prompt -> that prompt's: context [1, N M, D], pooled [1, V] of the first chunk."""
        pooled = None if self.pooled is None else self.pooled[:1]
        return type(self)(self.context.flatten(0, 1).unsqueeze(0), pooled)

    def where(self, given: Tensor) -> Self:
        """Zeros for all but the prompts that are `given`: [P] bool."""
        pooled = None if self.pooled is None else self.pooled.where(given[:, None], 0)
        return type(self)(self.context.where(given[:, None, None], 0), pooled)

    def zeroed(self) -> Self:
        """Zeros of the same shapes."""
        pooled = None if self.pooled is None else torch.zeros_like(self.pooled)
        return type(self)(torch.zeros_like(self.context), pooled)

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        return type(self)(self.context.to(device, dtype), pooled)


class Conditioning(NamedTuple):
    """Conditioning of B items: the context [B, M, D] of each.

    vector: [B, V], for a UNet that takes one (Podell et al. 2023, sec. 2.2); None elsewhere. kept: keys and
    values of these contexts for each layer, if they were computed before.
    """

    context: Tensor
    vector: Tensor | None = None
    kept: KeysValues | None = None

    @property
    def items(self) -> int:
        return len(self.context)

    def select(self, index: Tensor) -> Self:
        """Those of B items from those of P; index: [B] int64, which of the P each has."""
        vector = None if self.vector is None else self.vector.index_select(0, index)
        kept = self.kept
        if kept is not None:
            kept = {layer: tuple(x.index_select(0, index) for x in pair) for layer, pair in kept.items()}
        return type(self)(self.context.index_select(0, index), vector, kept)

    def clone(self) -> Self:
        """The same with memory of its own."""
        kept = self.kept and {layer: tuple(x.clone() for x in pair) for layer, pair in self.kept.items()}
        vector = None if self.vector is None else self.vector.clone()
        return type(self)(self.context.clone(), vector, kept)

    def tensors(self) -> list[Tensor]:
        """All that there are."""
        kept = (tensor for pair in (self.kept or {}).values() for tensor in pair)
        return [tensor for tensor in (self.context, self.vector, *kept) if tensor is not None]

    def by_name(self, prefix: str) -> dict[str, Tensor]:
        """Context, and vector if there is one, by their names after a prefix."""
        found = {prefix + "context": self.context, prefix + "vector": self.vector}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def to(self, dtype: torch.dtype) -> Self:
        """The same with context and vector in this dtype."""
        vector = None if self.vector is None else self.vector.to(dtype)
        return self._replace(context=self.context.to(dtype), vector=vector)


def index_tensor(prompt_index: Sequence[int], device: torch.device) -> Tensor:
    """[B] int64 on the device, copied without waiting for it."""
    return torch.tensor(prompt_index).to(device, non_blocking=True)


def distinct(prompts: Sequence[str]) -> tuple[list[str], list[int]]:
    """B prompts -> the P different ones, in order of appearance, and the index of each among them [B]."""
    unique = list(dict.fromkeys(prompts))
    return unique, [unique.index(prompt) for prompt in prompts]
