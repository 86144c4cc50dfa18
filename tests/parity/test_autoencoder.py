"""Our autoencoder against diffusers', weights carried over by diffusers' own reader of SD files."""

import pytest
import torch
from diffusers import AutoencoderKL as Reference
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor

from ldm.models.autoencoder import AutoencoderKL

TOLERANCE = 1e-5  # of the largest output, float32
SCALE = 0.18215


def pair(ch_mult: tuple[int, ...], num_res_blocks: int) -> tuple[AutoencoderKL, Reference]:
    """The same weights twice: ours, and diffusers'."""
    torch.manual_seed(0)
    ours = AutoencoderKL(ch=16, ch_mult=ch_mult, num_res_blocks=num_res_blocks, num_groups=8)
    levels = len(ch_mult)
    reference = Reference(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=[16 * mult for mult in ch_mult],
        layers_per_block=num_res_blocks,
        norm_num_groups=8,
    )
    released = {f"first_stage_model.{name}": tensor for name, tensor in ours.state_dict().items()}
    reference.load_state_dict(convert_ldm_vae_checkpoint(released, reference.config), strict=True)
    return ours.eval(), reference.eval()


def relative_error(ours: Tensor, reference: Tensor) -> float:
    return ((ours - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize(("ch_mult", "num_res_blocks"), [((1, 2, 4, 4), 2), ((1, 2, 2), 1)], ids=["f8", "f4"])
@torch.no_grad()
def test_both_ways_equal_diffusers(ch_mult, num_res_blocks):
    ours, reference = pair(ch_mult, num_res_blocks)
    torch.manual_seed(1)
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    posterior, expected = ours.encode(pixels), reference.encode(pixels).latent_dist
    assert relative_error(posterior.mean, SCALE * expected.mean) <= TOLERANCE
    assert relative_error(posterior.std, SCALE * expected.std) <= TOLERANCE
    assert relative_error(posterior.kl(), expected.kl()) <= TOLERANCE
    latents = posterior.sample(torch.randn_like(posterior.mean))
    assert relative_error(ours.decode(latents), reference.decode(latents / SCALE).sample) <= TOLERANCE


@torch.no_grad()
def test_the_tolerance_tells_neighbours_apart():
    """A picture one pixel aside, or latents scaled by 0.1822: each moves the output beyond the tolerance."""
    ours, _ = pair((1, 2, 2), 1)
    torch.manual_seed(1)
    pixels, latents = torch.rand(1, 3, 32, 32) * 2 - 1, torch.randn(1, 4, 8, 8)
    mean, decoded = ours.encode(pixels).mean, ours.decode(latents)
    ours.scale_factor = 0.1822
    assert relative_error(ours.encode(pixels).mean, mean) > 10 * TOLERANCE
    assert relative_error(ours.decode(latents), decoded) > 10 * TOLERANCE
    ours.scale_factor = SCALE
    assert relative_error(ours.encode(pixels.roll(1, dims=3)).mean, mean) > 10 * TOLERANCE
