"""torch.compile for the training step alone: one graph, for which nothing else has to wait."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from ldm.errors import UserError
from ldm.models.attention import repeat_batch
from ldm.models.conditioning import Conditioning
from ldm.models.unet import UNetModel

CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
WITH_GRAPHS = ("reduce-overhead", "max-autotune")  # modes that capture CUDA graphs themselves


class TrainingGraph:
    """A UNet's forward and backward pass, compiled at its first call.

    Compilation takes minutes and is for one batch size, with gradients or without: validation, previews,
    samples and prior images run the uncompiled network.

    mode: of torch.compile. backend: of torch.compile, or a function of a graph and its inputs.
    """

    def __init__(
        self, unet: UNetModel, *, mode: CompileMode | None = None, backend: str | Callable = "inductor"
    ):
        self.unet = unet
        self.has_cuda_graphs = mode in WITH_GRAPHS
        self.compiled = torch.compile(unet, mode=mode, backend=backend, dynamic=False)

    def predict(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """As `UNetModel.predict`, for training. Raises UserError if the compiler fails."""
        x, t = repeat_batch(x, conditioning.items), repeat_batch(t, conditioning.items)
        dtype = self.unet.dtype
        try:
            return self.compiled(x.to(dtype), t, conditioning.to(dtype))
        except BackendCompilerFailed as error:
            # A killed compiler leaves files cut short in inductor's cache, which are taken for whole
            remedy = (
                "Take it off; or, if an earlier compilation was killed, remove the file that is named here."
            )
            reason = str(error.inner_exception).strip().partition("\n")[0]
            what = f"The network cannot be compiled: {reason}"
            raise UserError(what, where="model.params.compile", remedy=remedy) from error
