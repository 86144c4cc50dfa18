"""LoRA's weights of one layer (Hu et al. 2022), and how they act beside it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.models.attention import repeat_batch
from ldm.models.conv1x1 import Conv1x1, conv1x1


class Product(Protocol):
    """The change of a layer's weight by alpha / rank times a product of matrices, as a LoHa's or LoKr's."""

    alpha: float
    rank: int

    def product(self) -> Tensor:
        """[out, in * kernel] in float32."""


def multiplication_of(layer: nn.Linear | nn.Conv2d) -> Callable[[Tensor, Tensor], Tensor]:
    """How a layer multiplies: its input, a weight of its kernel size -> its output without bias."""
    match layer:
        case nn.Linear():
            return F.linear
        case Conv1x1():
            return conv1x1
        case _:
            return partial(F.conv2d, stride=layer.stride, padding=layer.padding)


class SideLayer(nn.Module, ABC):
    """What is trained beside a frozen layer; a forward hook adds its output to the layer's.

    `enabled` False leaves that layer as it is.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d):
        super().__init__()
        self.enabled = True
        layer.register_forward_hook(self.add)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """The layer's input -> what is added to its output."""

    @abstractmethod
    def squared_norm(self) -> Tensor:
        """Squared Frobenius norm of the change of the layer's weight -> scalar."""

    def add(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + self(inputs[0]) if self.enabled else output


class WeightChange(SideLayer):
    """A change of a frozen layer's weight, whatever makes it."""

    def __init__(self, layer: nn.Linear | nn.Conv2d):
        super().__init__(layer)
        self.multiply = multiplication_of(layer)

    @abstractmethod
    def change(self) -> Tensor:
        """What is added to the layer's weight, in its shape."""

    def squared_norm(self) -> Tensor:
        return self.change().square().sum()

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.change().to(x.dtype))


class FixedChange(WeightChange):
    """A change that is not trained, such as a file's LoHa. change: [out, in, ...]."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, change: Tensor):
        super().__init__(layer)
        self.register_buffer("fixed", change)

    def change(self) -> Tensor:
        return self.fixed


class LoRALayer(SideLayer):
    """LoRA weights of one layer.

    down (A): [rank, in, ...] with the layer's kernel size, up (B): [out, rank, ...], 0 at the start. Both are
    float32 and are cast to the dtype of the layer's input.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, *, rank: int, alpha: float):
        super().__init__(layer)
        outside, inside, *kernel = layer.weight.shape
        self.rank = rank
        self.alpha = alpha
        self.mask: Tensor | None = None  # [b, ranks] of the items' timesteps, see `RankMasks`
        self.down = nn.Parameter(torch.empty(rank, inside, *kernel))
        self.up = nn.Parameter(torch.zeros(outside, rank, *[1] * len(kernel)))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # the default of Linear and Conv2d
        self.multiply = multiplication_of(layer)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Down [R, in, ...] and up [out, R, ...], whose product times alpha / rank is the update."""
        return self.down, self.up

    def forward(self, x: Tensor) -> Tensor:
        """The layer's input -> the low-rank update of its output."""
        down, up = (factor.to(x.dtype) for factor in self.factors())
        ranks, widen = (-1, F.linear) if down.ndim == 2 else (1, conv1x1)
        return widen(self._masked(self.multiply(x, down), ranks), up) * (self.alpha / self.rank)

    def _masked(self, thin: Tensor, dim: int) -> Tensor:
        """thin: [n, ..., R, ...], ranks in `dim` -> the same without the ranks that the timesteps lack."""
        if self.mask is None:
            return thin
        mask = repeat_batch(self.mask, len(thin)).to(thin.dtype)
        mask = mask.repeat(1, thin.shape[dim] // mask.shape[1])
        shape = [len(thin)] + [1] * (thin.ndim - 1)
        shape[dim] = thin.shape[dim]
        return thin * mask.view(shape)

    def squared_norm(self) -> Tensor:
        """||B A||^2 = tr((B^T B) (A A^T)), for which the product is not formed."""
        down, up = (factor.flatten(1) for factor in self.factors())
        return ((up.T @ up) * (down @ down.T)).sum() * (self.alpha / self.rank) ** 2


class OrthogonalLoRALayer(LoRALayer):
    """LoRA with orthonormal factors at the start (Soboleva et al. 2025, sec. 4.2, "Ortho-LoRA").

    The update is B S A - B0 S0 A0: B and A begin as singular vectors of a random matrix of the layer's shape,
    S as the smallest of its singular values. So every rank says something of its own, whichever are masked.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, *, rank: int, alpha: float):
        super().__init__(layer, rank=rank, alpha=alpha)
        outside, inside = len(self.up), self.down[0].numel()
        if rank > min(outside, inside):
            what = f"rank {rank} is more than a layer of {inside} inputs and {outside} outputs has"
            raise UserError(what, where="lora.rank", remedy=f"Choose {min(outside, inside)} or less.")
        # singular vectors of a Gaussian matrix are uniform, and independent of its singular values
        a, b = (torch.linalg.qr(torch.randn(size, rank))[0] for size in (inside, outside))
        values = torch.linalg.svdvals(torch.randn(outside, inside) / rank)[-rank:]
        self.scale = nn.Parameter(values)
        with torch.no_grad():
            self.down.copy_(a.T.reshape(self.down.shape))
            self.up.copy_(b.reshape(self.up.shape))
        for name in ("down", "up", "scale"):
            self.register_buffer(f"start_{name}", getattr(self, name).detach().clone())

    def factors(self) -> tuple[Tensor, Tensor]:
        """Those of the update, of twice the rank: see `joined_factors`."""
        return joined_factors(dict(self.named_parameters()) | dict(self.named_buffers()))


def joined_factors(own: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Down [2 r, in, ...] and up [out, 2 r, ...] of an `OrthogonalLoRALayer`, from its tensors by name.

    B S A - B0 S0 A0 = (B S - B0 S0) A + B0 S0 (A - A0): so no large terms cancel when they are multiplied.
    """
    kernel = [1] * (own["up"].ndim - 2)
    scale, start = (own[name].view(1, -1, *kernel) for name in ("scale", "start_scale"))
    first = own["start_up"] * start
    down = torch.cat([own["down"], own["down"] - own["start_down"]])
    return down, torch.cat([own["up"] * scale - first, first], dim=1)
