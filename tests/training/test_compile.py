"""The UNet is compiled by one key, and is then the same network."""

import copy

import pytest
import torch
from torch import Tensor

from ldm.training.latent_diffusion import LatentDiffusion


def test_compiling_keeps_names_and_copies(tiny_config: dict):
    plain = LatentDiffusion(**tiny_config)
    compiled = LatentDiffusion(**tiny_config, compile="default")
    assert compiled.networks["unet"]._compiled_call_impl is not None
    assert plain.networks["unet"]._compiled_call_impl is None
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert (
        copy.deepcopy(compiled).networks["unet"]._compiled_call_impl is None
    )  # as for an average of weights


def outcome(module: LatentDiffusion) -> list[Tensor]:
    torch.manual_seed(0)
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 32, 32)
    output = module.apply_model(x, t, context, [0, 1])
    output.square().sum().backward()
    return [output.detach(), *(p.grad for p in module.networks["unet"].parameters())]


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_compiled_network_is_the_plain_one(tiny_config: dict, tiny_networks: dict, backend: str):
    """One graph without breaks; outputs and gradients are the eager ones, to rounding in float32."""
    plain = LatentDiffusion(**tiny_config)
    plain.networks["unet"].load_state_dict(tiny_networks["unet"].state_dict())
    compiled = copy.deepcopy(plain)
    compiled.networks["unet"].fixed_shapes = True
    compiled.networks["unet"].compile(backend=backend, dynamic=False, fullgraph=True)
    for a, b in zip(outcome(compiled), outcome(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
