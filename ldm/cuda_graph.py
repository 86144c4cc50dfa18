"""CUDA graphs: the kernels of a piece of work are launched at once, not one by one by the host."""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.models.unet import Prepared, UNetModel

Work = Callable[[], None]
Recorder = Callable[[Work, tuple[int, int] | None], tuple[Work, tuple[int, int] | None]]

HOST_BOUND = 4 * 64 * 64  # items times cells of latents: above, a GPU takes longer than the host to launch


def capture(work: Work, pool: tuple[int, int] | None = None) -> tuple[Work, tuple[int, int]]:
    """Captures the kernels that `work` launches -> what launches them again, and the graph's memory pool.

    What they read has to be kept by the caller. Other threads may go on: they pin batches, average weights.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        work()
    return graph.replay, graph.pool()


class GraphedPrediction:
    """`UNetModel.predict` as a CUDA graph, captured at the second step of a kind.

    The kernels are the same, and so are the values. The graph keeps its memory from one sampling to the
    next, and is captured anew for another shape, other weights, or another precision.

    recorded: turns work into what repeats it, by default `capture`; on devices of this `device_type`, and
    for work up to HOST_BOUND. All else is predicted plainly.
    """

    def __init__(self, unet: UNetModel, *, recorded: Recorder = capture, device_type: str = "cuda"):
        self.unet = unet
        self.recorded = recorded
        self.device_type = device_type
        self._kind: tuple | None = None
        self._run: Work | None = None

    def __call__(self, x: Tensor, t: Tensor, prepared: Prepared) -> Tensor:
        """x: [b, C, h, w], t: [b], what was prepared for B items -> [B, C, h, w]."""
        items = len(prepared.index)
        if x.device.type != self.device_type or items * x[0, 0].numel() > HOST_BOUND:
            return self.unet.predict(x, t, prepared)
        kind = self._kind_of(x, prepared)
        if kind != self._kind:
            self._kind = kind
            self._run = None  # the memory of the last one first
            return self.unet.predict(x, t, prepared)
        if self._run is None:
            self._capture(x, t, prepared)
        self._x.copy_(x)
        self._t.copy_(t)
        if prepared is not self._last:
            for kept, new in zip(self._prepared.tensors(), prepared.tensors(), strict=True):
                kept.copy_(new)
            self._last = prepared
        self._run()
        return self._output.clone()

    def _capture(self, x: Tensor, t: Tensor, prepared: Prepared) -> None:
        self._x = x.clone()
        self._t = t.clone()
        self._last = prepared
        self._prepared = prepared.clone()

        def predict() -> None:
            self._output = self.unet.predict(self._x, self._t, self._prepared)

        self._run, _ = self.recorded(predict, None)

    def _kind_of(self, x: Tensor, prepared: Prepared) -> tuple:
        device = x.device.type
        lower = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        shapes = tuple(tensor.shape for tensor in prepared.tensors())
        return x.shape, x.dtype, shapes, lower, *(p.data_ptr() for p in self.unet.parameters())
