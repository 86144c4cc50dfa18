"""Memory order: what a strict comparison of strides gets wrong."""

import torch
import torch.nn.functional as F

from ldm.models.conv1x1 import Conv1x1
from ldm.optim.strides import same_order


def test_dimensions_of_size_1_say_nothing():
    layer = Conv1x1(6, 5, kernel_size=1).to(memory_format=torch.channels_last)
    x = torch.randn(2, 6, 4, 4).to(memory_format=torch.channels_last)
    (gradient,) = torch.autograd.grad(layer(x).sum(), [layer.weight])
    assert gradient.stride() != layer.weight.stride() and same_order(gradient, layer.weight)
    flat = (layer.weight.numel(),), (1,)
    assert torch.equal(gradient.as_strided(*flat), gradient.flatten())
    assert torch.equal(layer.weight.as_strided(*flat), layer.weight.flatten())


def test_another_order_is_told():
    weight = torch.randn(3, 4, 3, 3)
    assert same_order(weight, torch.empty_like(weight))
    assert not same_order(weight, weight.to(memory_format=torch.channels_last))
    assert not same_order(torch.randn(3, 4), torch.randn(4, 3).T)
    assert same_order(F.pad(torch.randn(4), (0, 1)), torch.randn(5)) and same_order(
        torch.ones(()), torch.ones(())
    )
