"""Group normalization in Triton is PyTorch's, forward and backward; without a GPU it is interpreted."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from ldm.models.group_norm_triton import group_norm  # noqa: E402  (where there is one)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [  # [N, C, H, W], groups
    (2, 32, 4, 8, 16),
    (1, 48, 5, 7, 16),
    (1, 80, 5, 16, 16),
    (2, 96, 1, 1, 8),
    (1, 8, 129, 128, 4),
]


def of(
    x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, *, groups: int, silu: bool, own: bool
) -> list[Tensor]:
    """Output and gradients."""
    inputs = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    if own:
        y = group_norm(*inputs, groups=groups, eps=1e-5, silu=silu)
        assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == x.dtype
    else:
        y = F.group_norm(inputs[0], groups, *inputs[1:], 1e-5)
        y = F.silu(y) if silu else y
    return [y, *torch.autograd.grad(y, inputs, dy)]


@pytest.mark.gpu
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_are_those_of_pytorch(shape: tuple[int, ...], silu: bool):
    """Also for values far from 0, where a variance by sums of squares would be lost."""
    n, c, h, w, groups = shape
    torch.manual_seed(0)
    x = torch.randn(n, c, h, w) * torch.rand(c, 1, 1) + 50 * torch.randn(n, c, 1, 1)
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, torch.randn_like(x)))
    tensors = [t.to(DEVICE) for t in (x, torch.randn(c), torch.randn(c), dy)]
    exact = of(*(t.double() for t in tensors), groups=groups, silu=silu, own=False)
    for found, expected in zip(of(*tensors, groups=groups, silu=silu, own=True), exact, strict=True):
        error = (found.double() - expected).norm() / expected.norm().clamp(min=1e-9)
        assert error < 2e-5 or expected.norm() < 1e-4 * dy.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_is_rounded_once(dtype: torch.dtype):
    torch.manual_seed(0)
    x, weight, bias, dy = torch.randn(1, 64, 4, 8), torch.randn(64), torch.randn(64), torch.randn(1, 64, 4, 8)
    lower = [t.to(DEVICE, dtype) for t in (x, weight, bias, dy)]
    exact = of(*(t.double() for t in lower), groups=32, silu=True, own=False)
    for found, expected in zip(of(*lower, groups=32, silu=True, own=True), exact, strict=True):
        eps = torch.finfo(dtype).eps
        assert found.dtype == dtype and (found.double() - expected).norm() <= eps * expected.norm()
