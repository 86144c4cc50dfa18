"""A 1x1 convolution is the same by a matrix product, forward and backward, and keeps the layout."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.models.conv1x1 import Conv1x1, conv1x1

SHAPES = [(2, 24, 8, 5, 16), (1, 3, 1, 1, 4), (3, 2, 4, 4, 1)]  # B, C, h, w, D


def output_and_gradients(f, shape: tuple[int, ...], layout: torch.memory_format) -> list[Tensor]:
    b, c, h, w, d = shape
    torch.manual_seed(0)
    x = torch.randn(b, c, h, w, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    weight, bias = (torch.randn(size, dtype=torch.float64).requires_grad_() for size in ((d, c, 1, 1), (d,)))
    y = f(x, weight, bias)
    return [y, *torch.autograd.grad(y.square().sum(), (x, weight, bias))]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_convolution(shape: tuple[int, ...], layout: torch.memory_format):
    ours, theirs = (output_and_gradients(f, shape, layout) for f in (conv1x1, F.conv2d))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert all(tensor.is_contiguous(memory_format=layout) for tensor in ours[:2])


def test_channels_last_is_a_matrix_product_and_other_input_is_not_copied(monkeypatch: pytest.MonkeyPatch):
    convolved = []
    monkeypatch.setattr(F, "conv2d", lambda *given: convolved.append(given))
    x, layer = torch.randn(2, 8, 4, 4), Conv1x1(8, 16, 1)
    assert layer(x.contiguous(memory_format=torch.channels_last)).shape == (2, 16, 4, 4)
    assert not convolved
    layer(x)
    assert convolved[0][0] is x


def test_the_gradient_of_its_weight_is_kept_as_it_comes():
    """In the layout of the weight: autograd would copy any other."""
    layer, came = Conv1x1(8, 16, 1).to(memory_format=torch.channels_last), []
    layer.weight.register_hook(lambda gradient: came.append(gradient.data_ptr()))
    layer(torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)).square().sum().backward()
    assert came == [layer.weight.grad.data_ptr()]
