"""L2-SP beside a LoRA: the distance is of the weights that it changes, computed without its product."""

import pytest
import torch
from torch import nn

from ldm.models.lora_layer import OrthogonalLoRALayer
from ldm.training.latent_diffusion import LatentDiffusion
from ldm.training.techniques import L2SP
from tests.factories import build_module

EVERY = {"unet": ["attention", "feed_forward", "projections", "convolutions"], "alpha": 3.0, "rank": 4}


@pytest.mark.parametrize("by_timestep", [None, {"orthogonal": True}, {"orthogonal": False}])
def test_the_distance_is_that_of_the_formed_product(tiny_config: dict, by_timestep: dict | None):
    params = {**EVERY, "rank_by_timestep": by_timestep}
    lora = {"target": "ldm.models.lora.LoRA", "params": params}
    module: LatentDiffusion = build_module(
        tiny_config, trainable={"lora": lora}, objective={"l2_sp_weight": 0.5}
    )
    module.setup("fit")
    assert float(module._l2_sp.distance()) < 1e-9 and module._l2_sp.pairs == []
    torch.manual_seed(0)
    for parameter in module.lora.parameters():
        nn.init.normal_(parameter, std=0.1)
    products = [
        (alpha / len(down)) * up.flatten(1) @ down.flatten(1)
        for inner in module.lora.weights().values()
        for down, up, alpha in inner.values()
    ]
    assert len(products) > 40
    expected = sum(float(product.square().sum()) for product in products)
    distance = module._l2_sp.distance()
    assert float(distance) == pytest.approx(expected, rel=1e-5)
    distance.backward()
    layer = module.lora.layers["unet"].get_submodule("middle_block.0.in_layers.2")
    down, up = layer.down.detach().flatten(1), layer.up.detach().flatten(1)
    if by_timestep is None:  # the gradient of ||s B A||^2 for B is 2 s^2 B A A^T
        torch.testing.assert_close(layer.up.grad.flatten(1), 2 * 0.75**2 * up @ down @ down.T)


@pytest.mark.parametrize("moved", [1e-4, 1e-2])
def test_a_small_distance_is_no_rounding(moved: float):
    """Under autocast too, of factors that begin orthonormal: their first product is taken off again."""
    torch.manual_seed(0)
    beside = OrthogonalLoRALayer(nn.Linear(320, 320), rank=8, alpha=8.0)
    first = formed(beside)
    with torch.no_grad():
        for parameter in beside.parameters():
            parameter.add_(moved * torch.randn_like(parameter))
    expected = float((formed(beside) - first).square().sum())
    distance = L2SP(beside.parameters(), beside=[beside])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float(distance.distance().detach()) == pytest.approx(expected, rel=1e-4)
        x = torch.randn(4, 320)
        update = beside(x).float()
    torch.testing.assert_close(update, x @ (formed(beside) - first).T.float(), rtol=0.05, atol=0.02 * moved)


def formed(beside: OrthogonalLoRALayer) -> torch.Tensor:
    """B S A in float64."""
    up, scale, down = (x.detach().double() for x in (beside.up, beside.scale, beside.down))
    return (up * scale) @ down
