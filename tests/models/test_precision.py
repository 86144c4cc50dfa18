"""bfloat16 networks: their outputs and gradients are float32's to bfloat16's rounding."""

import copy

import pytest
import torch
from torch import Tensor, nn

from ldm.models.conditioning import Conditioning


def flat_gradient(unet: nn.Module, text_encoder: nn.Module, *, autocast: bool) -> tuple[Tensor, Tensor]:
    """-> loss and all gradients of UNet and text encoder, in float32."""
    draws = torch.Generator().manual_seed(1)
    x, target = (torch.randn(2, 4, 8, 8, generator=draws) for _ in range(2))
    ids = torch.randint(100, (2, 32), generator=draws)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        prediction = unet.predict(x, torch.tensor([20, 700]), Conditioning(text_encoder(ids)))
    loss = (prediction.float() - target).square().mean()
    loss.backward()
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    return loss.detach(), torch.cat([p.grad.float().reshape(-1) for p in parameters if p.grad is not None])


@pytest.mark.parametrize("way", ["weights", "autocast"])
def test_the_gradient_in_bfloat16_is_that_of_float32(tiny_networks: dict[str, nn.Module], way: str):
    """Of bfloat16 weights, and under autocast: within 4 % of its norm; a wrong path would be off by more."""
    networks = [tiny_networks["unet"], tiny_networks["text_encoder"]]
    loss, exact = flat_gradient(*copy.deepcopy(networks), autocast=False)
    rounded_networks = copy.deepcopy(networks)
    if way == "weights":
        rounded_networks = [network.bfloat16() for network in rounded_networks]
    rounded_loss, rounded = flat_gradient(*rounded_networks, autocast=way == "autocast")
    assert rounded_loss == pytest.approx(float(loss), rel=0.01)
    assert len(rounded) == len(exact)
    error = float((rounded - exact).norm() / exact.norm())
    assert 1e-4 < error < 0.04  # and it is not float32 by mistake
    other = flat_gradient(*[n.bfloat16() for n in perturbed(networks)], autocast=False)[1]
    assert float((other - exact).norm() / exact.norm()) > 0.04


def perturbed(networks: list[nn.Module]) -> list[nn.Module]:
    """Copies with weights that are a tenth off: what the bound must tell from rounding."""
    copies = copy.deepcopy(networks)
    with torch.no_grad():
        for parameter in (p for network in copies for p in network.parameters()):
            parameter.mul_(1.1)
    return copies
