"""torch.compile for the training step alone: one graph, which nothing else has to wait for."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ldm.models.attention import index_of, repeat_rows
from ldm.models.unet import UNetModel

CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


class TrainingGraph:
    """A UNet's forward and backward pass, translated at its first call.

    A translation takes minutes and is of one batch size, with gradients or without: validation, previews,
    samples and prior images run the network as it is. Each item gets a context of its own, because how many
    different ones a batch has would be a shape too.

    mode: of torch.compile. backend: what translates, or a function of a graph and its inputs.
    """

    def __init__(
        self, unet: UNetModel, *, mode: CompileMode | None = None, backend: str | Callable = "inductor"
    ):
        self.unet = unet
        self.translated = torch.compile(unet, mode=mode, backend=backend, dynamic=False)

    def predict(self, x: Tensor, t: Tensor, context: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """As `UNetModel.predict`, for training."""
        if rows is not None:
            x, t = repeat_rows(x, len(rows)), repeat_rows(t, len(rows))
            context = context.index_select(0, index_of(rows, context.device))
        dtype = self.unet.time_embed[0].weight.dtype
        return self.translated(x.to(dtype), t, context.to(dtype), None)
