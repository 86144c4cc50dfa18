"""Our UNet against diffusers', weights carried over by diffusers' own reader of Stable Diffusion files."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from torch import Tensor, nn

from ldm.models.conditioning import Conditioning
from ldm.models.unet import UNetModel

TOLERANCE = 1e-5  # of the largest output, float32

SD1 = {"num_heads": 4, "context_dim": 24}
SD2 = {"num_head_channels": 8, "context_dim": 40, "use_linear_in_transformer": True}
INPAINTING = {"in_channels": 9, "num_heads": 2, "context_dim": 24}
DEEPER = {"num_heads": 4, "context_dim": 24, "transformer_depth": 2, "num_res_blocks": 1}


def build(**params) -> UNetModel:
    """Four levels as in SD, 32 to 128 channels; no layer left at zero, where it would hide mistakes."""
    torch.manual_seed(0)
    unet = UNetModel(**{"model_channels": 32, "num_groups": 8, **params})
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return unet.eval()


def counterpart(unet: UNetModel, **params) -> UNet2DConditionModel:
    """The same network in diffusers, whose `attention_head_dim` means the number of heads."""
    widths = [32, 64, 128, 128]
    heads = params.get("num_heads") or [width // params["num_head_channels"] for width in widths]
    reference = UNet2DConditionModel(
        in_channels=params.get("in_channels", 4),
        block_out_channels=widths,
        layers_per_block=params.get("num_res_blocks", 2),
        attention_head_dim=heads,
        cross_attention_dim=params["context_dim"],
        norm_num_groups=8,
        use_linear_projection=params.get("use_linear_in_transformer", False),
        transformer_layers_per_block=params.get("transformer_depth", 1),
    )
    released = {f"model.diffusion_model.{name}": tensor for name, tensor in unet.state_dict().items()}
    reference.load_state_dict(convert_ldm_unet_checkpoint(released, reference.config), strict=True)
    return reference.eval()


def relative_error(ours: Tensor, reference: Tensor) -> float:
    return ((ours - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize("params", [SD1, SD2, INPAINTING, DEEPER], ids=["sd1", "sd2", "inpainting", "deeper"])
@torch.no_grad()
def test_output_equals_diffusers(params):
    unet = build(**params)
    reference = counterpart(unet, **params)
    torch.manual_seed(1)
    x, context = torch.randn(2, params.get("in_channels", 4), 16, 8), torch.randn(2, 7, params["context_dim"])
    timesteps = torch.tensor([1, 801])
    expected = reference(x, timesteps, context).sample
    assert relative_error(unet(x, timesteps, Conditioning(context)), expected) <= TOLERANCE


@torch.no_grad()
def test_epsilons_equal_diffusers():
    """With activations so small that the epsilons of the norms, 1e-5 and 1e-6, matter."""
    unet = build(**SD1)
    for name, parameter in unet.named_parameters():
        parameter.mul_(0.02 if parameter.ndim == 4 and "proj_out" not in name else 1.0)
    reference = counterpart(unet, **SD1)
    torch.manual_seed(1)
    x, context, timesteps = 0.01 * torch.randn(2, 4, 16, 8), torch.randn(2, 7, 24), torch.tensor([1, 801])
    expected = reference(x, timesteps, context).sample
    assert relative_error(unet(x, timesteps, Conditioning(context)), expected) <= TOLERANCE


@torch.no_grad()
def test_the_tolerance_tells_neighbours_apart():
    """One timestep on, one token less, or another head count: each moves the output beyond the tolerance."""
    unet = build(**SD1)
    torch.manual_seed(1)
    x, context, timesteps = torch.randn(2, 4, 16, 8), torch.randn(2, 7, 24), torch.tensor([1, 801])
    output = unet(x, timesteps, Conditioning(context))
    other_heads = build(**SD1 | {"num_heads": 8})
    assert relative_error(unet(x, timesteps + 1, Conditioning(context)), output) > 10 * TOLERANCE
    assert relative_error(unet(x, timesteps, Conditioning(context[:, :-1])), output) > 10 * TOLERANCE
    assert relative_error(other_heads(x, timesteps, Conditioning(context)), output) > 10 * TOLERANCE


def test_gradients_equal_diffusers():
    unet = build(**SD1)
    reference = counterpart(unet, **SD1)
    torch.manual_seed(1)
    x, context, timesteps = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 24), torch.tensor([500])
    unet(x, timesteps, Conditioning(context)).square().mean().backward()
    reference(x, timesteps, context).sample.square().mean().backward()
    for ours, theirs in [
        (unet.time_embed[0], reference.time_embedding.linear_1),
        (unet.input_blocks[0][0], reference.conv_in),
        (
            unet.input_blocks[1][1].transformer_blocks[0].attn2.to_k,
            reference.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k,
        ),
    ]:
        assert relative_error(ours.weight.grad, theirs.weight.grad) <= 10 * TOLERANCE
