import math

import pytest
import torch

from ldm.models.attention import GEGLU, CrossAttention, SpatialTransformer, attend
from ldm.models.conditioning import Conditioning


@pytest.mark.parametrize("context_dim", [None, 6], ids=["self", "cross"])
@torch.no_grad()
def test_attention_is_softmax_of_scaled_products_head_by_head(context_dim):
    torch.manual_seed(0)
    attention = CrossAttention(8, num_heads=2, context_dim=context_dim)
    x = torch.randn(3, 5, 8)
    context = None if context_dim is None else torch.randn(3, 7, context_dim)
    source = x if context is None else context
    q, k, v = attention.to_q(x), attention.to_k(source), attention.to_v(source)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        weights = torch.softmax(q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(4), dim=-1)
        heads.append(weights @ v[..., part])
    expected = attention.to_out(torch.cat(heads, dim=-1))
    conditioning = None if context is None else Conditioning(context)
    torch.testing.assert_close(attention(x, conditioning), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [10, 16])
def test_widths_filled_up_with_zeros_attend_as_they_are(width: int):
    torch.manual_seed(0)
    q, k, v, weight = (torch.randn(2, 3, n, width) for n in (5, 7, 7, 5))
    found = []
    for attention in (attend, torch.nn.functional.scaled_dot_product_attention):
        tensors = [t.clone().requires_grad_() for t in (q, k, v)]
        y = attention(*tensors)
        found.append([y, *torch.autograd.grad((weight * y).sum(), tensors)])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_geglu_gates_the_first_half_with_the_exact_gelu_of_the_second():
    gate = torch.tensor([-2.0, -0.5, 0.0, 1.0])
    layer = GEGLU(2, 1)
    layer.proj.weight.copy_(torch.eye(2))
    layer.proj.bias.zero_()
    expected = 3 * gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    torch.testing.assert_close(layer(torch.stack([torch.full((4,), 3.0), gate], dim=1))[:, 0], expected)


@pytest.mark.parametrize("use_linear", [False, True])
def test_a_fresh_spatial_transformer_is_the_identity(use_linear):
    layer = SpatialTransformer(8, num_heads=2, context_dim=6, use_linear=use_linear, num_groups=4)
    x = torch.randn(2, 8, 3, 5)
    assert torch.equal(layer(x, Conditioning(torch.randn(2, 7, 6))), x)


@torch.no_grad()
def test_convolution_and_linear_projections_are_one_network():
    """SD 1.x and SD 2.x differ in the shape of these two weights alone; cells must keep their places."""
    torch.manual_seed(0)
    convolution = SpatialTransformer(8, num_heads=2, context_dim=6, num_groups=4)
    torch.nn.init.normal_(convolution.proj_out.weight)
    linear = SpatialTransformer(8, num_heads=2, context_dim=6, use_linear=True, num_groups=4)
    state = convolution.state_dict()
    linear.load_state_dict({k: v.flatten(1) if v.ndim == 4 else v for k, v in state.items()})
    x, conditioning = torch.randn(2, 8, 3, 5), Conditioning(torch.randn(2, 7, 6))
    torch.testing.assert_close(linear(x, conditioning), convolution(x, conditioning), rtol=1e-5, atol=1e-5)
