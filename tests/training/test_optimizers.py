"""Optimizers: what they promise is checked step for step against plain AdamW."""

import pytest
import torch
from torch import Tensor, nn

from ldm.training.optimizers import adamw


def network(layout: torch.memory_format = torch.channels_last) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 2, 3, padding=1)
    return nn.Sequential(*layers).to(memory_format=layout)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, *, steps: range) -> list[Tensor]:
    """Some steps on items that depend on their number alone -> the weights afterwards."""
    for k in steps:
        x = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(k))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize("fused", [True, False])
def test_states_of_another_layout_resume_as_if_never_stopped(fused: bool):
    """A checkpoint of plain strides goes on under channels-last weights."""

    def optimizer(net: nn.Module) -> torch.optim.Optimizer:
        return adamw({"net": (net, 1e-2)}, fused=fused)

    whole = network()
    expected = train(whole, optimizer(whole), steps=range(4))
    before = network(torch.contiguous_format)
    first = optimizer(before)
    train(before, first, steps=range(2))
    after = network()
    after.load_state_dict(before.state_dict())
    second = optimizer(after)
    second.load_state_dict(first.state_dict())
    resumed = train(after, second, steps=range(2, 4))
    for a, b in zip(resumed, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
