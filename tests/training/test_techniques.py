"""Techniques that a config can switch on: off they change nothing, on they do what their formula says."""

import pytest
import torch
from torch import Tensor

from ldm.training.latent_diffusion import LatentDiffusion


@pytest.fixture
def batch() -> dict:
    moments = torch.cat(
        [torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(4, 4, 8, 8)], 1
    )
    return {
        "moments": moments,
        "caption": ["a photo of sks disc"] * 2 + ["a photo of a disc"] * 2,
        "is_prior": torch.tensor([False, False, True, True]),
        "item": torch.tensor([4, 5, 4, 5]),
    }


def build(tiny_config: dict, tiny_networks: dict, **settings: object) -> LatentDiffusion:
    module = LatentDiffusion(**tiny_config, seed=7, **settings)
    for name, network in module.networks.items():
        network.load_state_dict(tiny_networks[name].state_dict())
    return module


class SeenNoise(LatentDiffusion):
    """Keeps what the loss compared the prediction with: eps is the noise itself."""

    def apply_model(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        a = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        self.noise = (x - a.sqrt() * self.x0) / (1 - a).sqrt()
        return super().apply_model(x, t, context)


def noise_of(config: dict, batch: dict, **settings: object) -> Tensor:
    module = SeenNoise(**config, seed=7, **settings)
    module.x0 = batch["moments"].chunk(2, dim=1)[0]
    with torch.no_grad():
        module.loss_per_item(batch)
    return module.noise


def test_offset_noise_moves_whole_channels_of_an_item(tiny_config, batch):
    plain, moved = noise_of(tiny_config, batch), noise_of(tiny_config, batch, offset_noise=0.5)
    offset = moved - plain
    flat = offset.flatten(2)
    assert (flat - flat.mean(2, keepdim=True)).abs().max() < 2e-3  # one number per item and channel
    means = flat.mean(2) / 0.5
    assert means.abs().max() < 4 and means.std() > 0.4  # drawn from N(0, 1)
    assert len({round(float(x), 4) for x in means.flatten()}) == means.numel()


def test_the_pull_is_its_formula(tiny_config, tiny_networks, batch):
    plain = build(tiny_config, tiny_networks)
    pulled = build(tiny_config, tiny_networks, l2_pull=0.25)
    pulled.setup("fit")
    torch.testing.assert_close(pulled.training_step(batch, 0), plain.training_step(batch, 0), rtol=0, atol=0)
    generator = torch.Generator().manual_seed(1)
    moves = {}
    for name, parameter in pulled.named_parameters():
        if parameter.requires_grad:
            moves[name] = 0.01 * torch.randn(parameter.shape, generator=generator)
            for module in (plain, pulled):
                module.get_parameter(name).data += moves[name]
    expected = 0.25 * sum(float(move.square().sum()) for move in moves.values())
    losses = [module.training_step(batch, 0) for module in (plain, pulled)]
    assert float(losses[1] - losses[0]) == pytest.approx(expected, rel=1e-4)
    for loss in losses:
        loss.backward()
    for name, move in moves.items():
        difference = pulled.get_parameter(name).grad - plain.get_parameter(name).grad
        torch.testing.assert_close(difference, 2 * 0.25 * move, rtol=1e-3, atol=1e-5)
