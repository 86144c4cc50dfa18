"""Self-attention over latent cells, cross-attention to the prompt (Rombach et al. 2022, sec. 3.3)."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.conditioning import Conditioning
from ldm.models.conv1x1 import Conv1x1
from ldm.models.group_norm import GroupNorm


def zero_init(layer: nn.Module) -> nn.Module:
    """Zero initialization of a layer: a residual branch that ends in it starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def repeat_batch(x: Tensor, size: int) -> Tensor:
    """The batch repeated along its first dimension. [b, ...] -> [size, ...]; size is a multiple of b."""
    return x if len(x) == size else torch.cat([x] * (size // len(x)))  # `repeat` would lose the layout


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention, softmax(q k^T / sqrt(c)) v (Vaswani et al. 2017, eq. 1).

    q: [B, heads, N, c], k and v: [B, heads, M, c] -> [B, heads, N, c].
    Head widths that are no multiple of 8 are padded with zeros: at c = 10 that makes a CPU twice as fast.
    """
    width = q.shape[-1]
    if width % 8 == 0:
        return F.scaled_dot_product_attention(q, k, v)
    q, k, v = (F.pad(t, (0, -width % 8)) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=width**-0.5)[..., :width]


class CrossAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017), to x or to the context. x: [B, N, C] -> [B, N, C]."""

    def __init__(self, channels: int, *, num_heads: int, context_dim: int | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim or channels, channels, bias=False)
        self.to_v = nn.Linear(context_dim or channels, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """[B, M, D] -> keys and values, both [B, heads, M, c]."""
        return self._heads(self.to_k(context)), self._heads(self.to_v(context))

    def forward(self, x: Tensor, conditioning: Conditioning | None = None) -> Tensor:
        """Without prompts, x attends to itself."""
        told = Conditioning(x) if conditioning is None else conditioning
        k, v = self.keys_values(told.context) if told.kept is None else told.kept[self]
        q = self._heads(self.to_q(x))
        return self.to_out(attend(q, k, v).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, N, heads c] -> [B, heads, N, c]."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class GEGLU(nn.Module):
    """GELU-gated linear unit (Shazeer 2020). [..., in] -> [..., out]."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.proj = nn.Linear(in_features, 2 * out_features)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Position-wise feed-forward layer, four times as wide inside. [B, N, C] -> [B, N, C]."""

    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.Sequential(  # Identity stands for SD's dropout (p = 0), so that the names are SD's
            GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Transformer block: self-attention, cross-attention, feed-forward. x: [b, N, C] -> [B, N, C].

    Where b is less than the B items of the conditioning (guidance), self-attention runs on the b items alone,
    and x is then repeated for all the prompts.
    """

    def __init__(self, channels: int, *, num_heads: int, context_dim: int):
        super().__init__()
        self.attn1 = CrossAttention(channels, num_heads=num_heads)
        self.attn2 = CrossAttention(channels, num_heads=num_heads, context_dim=context_dim)
        self.ff = FeedForward(channels)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        x = repeat_batch(x + self.attn1(self.norm1(x)), conditioning.items)
        x = x + self.attn2(self.norm2(x), conditioning)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer over the cells of a feature map. x: [b, C, h, w], conditioning of B items -> [B, C, h, w].

    The projections in and out are 1x1 convolutions in SD 1.x, linear layers (`use_linear`) in SD 2.x.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int,
        context_dim: int,
        depth: int = 1,
        use_linear: bool = False,
        num_groups: int = 32,
    ):
        super().__init__()
        self.use_linear = use_linear
        self.norm = GroupNorm(num_groups, channels, eps=1e-6)
        projection = nn.Linear if use_linear else partial(Conv1x1, kernel_size=1)
        self.proj_in = projection(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, num_heads=num_heads, context_dim=context_dim)
            for _ in range(depth)
        )
        self.proj_out = zero_init(projection(channels, channels))

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        h = self.norm(x)
        h = self.proj_in(_cells(h)) if self.use_linear else _cells(self.proj_in(h))
        for block in self.transformer_blocks:
            h = block(h, conditioning)
        height = x.shape[2]
        if self.use_linear:
            h = _feature_map(self.proj_out(h), height)
        else:
            h = self.proj_out(_feature_map(h, height))
        return repeat_batch(x, len(h)) + h


def _cells(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h w, C]; a view, if x is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _feature_map(x: Tensor, height: int) -> Tensor:
    """[B, h w, C] of h rows -> [B, C, h, w], a channels_last view."""
    return x.unflatten(1, (height, -1)).permute(0, 3, 1, 2)
