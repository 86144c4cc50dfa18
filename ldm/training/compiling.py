"""torch.compile for the training step alone: one graph, for which nothing else has to wait."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from ldm.models.attention import repeat_batch
from ldm.models.conditioning import Conditioning
from ldm.models.unet import UNetModel

log = logging.getLogger(__name__)

CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


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
        self.compiled = torch.compile(unet, mode=mode, backend=backend, dynamic=False)
        self._is_compiled = False

    def predict(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """As `UNetModel.predict`, for training."""
        x, t = repeat_batch(x, conditioning.items), repeat_batch(t, conditioning.items)
        dtype = self.unet.dtype
        x, conditioning = x.to(dtype), conditioning.to(dtype)
        if self._is_compiled:
            return self.compiled(x, t, conditioning)
        prediction = whole_compilation(lambda: self.compiled(x, t, conditioning))
        self._is_compiled = True
        return prediction


def whole_compilation(call: Callable[[], Tensor]) -> Tensor:
    """A call that compiles, forward and backward, whatever inductor's cache holds -> its result.

    Inductor takes each file of its cache for whole, but the compilers it starts do not write atomically: what
    a killed one left is named by the error that it leads to. It is removed, and the call is made again.
    """
    removed: set[Path] = set()
    while True:
        try:
            with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
                return call()
        except BackendCompilerFailed as error:
            torn = libraries_named(str(error)) - removed
            if not torn:
                raise
            log.warning("Compiled anew, for a killed process may have left it half written: %s", *torn)
        removed |= torn
        for path in torn:
            path.unlink(missing_ok=True)
        torch._inductor.utils.clear_caches()
        torch._dynamo.reset()


def libraries_named(message: str) -> set[Path]:
    """The libraries and precompiled headers of inductor's cache that a message names, and that exist."""
    cache = re.escape(torch._inductor.runtime.cache_dir_utils.cache_dir())
    named = re.findall(rf"{cache}/[\w./+-]*\.(?:so|o|gch)\b", message)
    return {Path(path) for path in named if Path(path).is_file()}
