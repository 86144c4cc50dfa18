"""The KL-regularized VAE of Stable Diffusion (Rombach et al. 2022, sec. 3.1), in SD's own names."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.annotations import PositiveFloat, PositiveInt
from ldm.models.conv1x1 import Conv1x1
from ldm.models.group_norm import GroupNorm
from ldm.models.widths import check_widths


@dataclass(frozen=True)
class DiagonalGaussian:
    """Diagonal Gaussian posterior over latents, in scaled units: mean and std [B, embed_dim, h, w]."""

    mean: Tensor
    std: Tensor
    _: KW_ONLY
    scale_factor: float = 1.0  # scaled = scale_factor * unscaled; needed by `kl` alone

    @classmethod
    def from_latent_stats(cls, latent_stats: Tensor) -> Self:
        """[B, 2 * embed_dim, h, w] as in `latent_stats` -> the Gaussian with that mean and std."""
        return cls(*latent_stats.chunk(2, dim=1))

    @property
    def latent_stats(self) -> Tensor:
        """Mean and std, concatenated, as the latent cache holds them -> [B, 2 * embed_dim, h, w]."""
        return torch.cat([self.mean, self.std], dim=1)

    def sample(self, noise: Tensor) -> Tensor:
        """A sample of the latents from standard normal noise [B, embed_dim, h, w] -> the same shape."""
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """KL divergence of the unscaled posterior to N(0, 1), summed over all latents -> [B] float32."""
        mean, std = self.mean.float() / self.scale_factor, self.std.float() / self.scale_factor
        return (0.5 * (mean**2 + std**2 - 1) - std.log()).sum(dim=(1, 2, 3))


class ResnetBlock(nn.Module):
    """Residual block of two 3x3 convolutions. [B, in_channels, H, W] -> [B, out_channels, H, W]."""

    def __init__(self, in_channels: int, out_channels: int, *, num_groups: int):
        super().__init__()
        self.norm1 = GroupNorm(num_groups, in_channels, eps=1e-6, silu=True)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(num_groups, out_channels, eps=1e-6, silu=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = Conv1x1(in_channels, out_channels, 1)
        else:
            self.nin_shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over cells with 1x1 convolutions. [B, C, h, w] -> [B, C, h, w]."""

    def __init__(self, channels: int, *, num_groups: int):
        super().__init__()
        self.norm = GroupNorm(num_groups, channels, eps=1e-6)
        self.q = Conv1x1(channels, channels, 1)
        self.k = Conv1x1(channels, channels, 1)
        self.v = Conv1x1(channels, channels, 1)
        self.proj_out = Conv1x1(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (rearrange(f(normed), "b c h w -> b 1 (h w) c") for f in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(attended, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Stride-2 convolution with asymmetric padding, right and below. [B, C, H, W] -> [B, C, H/2, W/2]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, then a convolution. [B, C, h, w] -> [B, C, 2h, 2w]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, then the down- or upsampling, if any, to the next one."""

    def __init__(self, in_channels: int, out_channels: int, *, num_blocks: int, num_groups: int):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.Sequential(*(ResnetBlock(a, b, num_groups=num_groups) for a, b in pairwise(widths)))
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample(self.downsample(self.block(x)))


def middle(channels: int, *, num_groups: int) -> nn.Sequential:
    """Residual block, self-attention, residual block at the lowest resolution. [B, C, h, w] -> same shape."""
    return nn.Sequential(
        OrderedDict(
            block_1=ResnetBlock(channels, channels, num_groups=num_groups),
            attn_1=AttnBlock(channels, num_groups=num_groups),
            block_2=ResnetBlock(channels, channels, num_groups=num_groups),
        )
    )


class Encoder(nn.Module):
    """Encoder: pixels [B, in_channels, H, W] -> features [B, out_channels, h, w]."""

    def __init__(
        self, in_channels: int, out_channels: int, *, widths: Sequence[int], num_blocks: int, num_groups: int
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down = nn.Sequential(
            *(
                Level(previous, width, num_blocks=num_blocks, num_groups=num_groups)
                for previous, width in zip([widths[0], *widths], widths, strict=False)
            )
        )
        for level, width in zip(self.down[:-1], widths, strict=False):
            level.downsample = Downsample(width)
        self.mid = middle(widths[-1], num_groups=num_groups)
        self.norm_out = GroupNorm(num_groups, widths[-1], eps=1e-6, silu=True)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mid(self.down(self.conv_in(x)))
        return self.conv_out(self.norm_out(h))


class Decoder(nn.Module):
    """Decoder: features [B, in_channels, h, w] -> pixels [B, out_channels, H, W]; `up.0` runs last."""

    def __init__(
        self, in_channels: int, out_channels: int, *, widths: Sequence[int], num_blocks: int, num_groups: int
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1], num_groups=num_groups)
        self.up = nn.ModuleList(
            Level(previous, width, num_blocks=num_blocks, num_groups=num_groups)
            for previous, width in zip([*widths[1:], widths[-1]], widths, strict=True)
        )
        for level, width in zip(self.up[1:], widths[1:], strict=True):
            level.upsample = Upsample(width)
        self.norm_out = GroupNorm(num_groups, widths[0], eps=1e-6, silu=True)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(self.norm_out(h))


class AutoencoderKL(nn.Module):
    """Stable Diffusion's VAE, downsampling by f = 2 ** (levels - 1) to `embed_dim` latent channels.

    in_channels: of images. z_channels: of the encoder's output. ch: width of the first level.
    ch_mult: width of each level over `ch`. num_res_blocks: residual blocks of each level.
    embed_dim: channels of latents. num_groups: of group norms.
    scale_factor: brings latents to about unit variance; encode and decode apply it, nothing else does.
    """

    def __init__(
        self,
        *,
        in_channels: PositiveInt = 3,
        z_channels: PositiveInt = 4,
        ch: PositiveInt = 128,
        ch_mult: Sequence[PositiveInt] = (1, 2, 4, 4),
        num_res_blocks: PositiveInt = 2,
        embed_dim: PositiveInt = 4,
        scale_factor: PositiveFloat = 0.18215,
        num_groups: PositiveInt = 32,
    ):
        super().__init__()
        self.factor = 2 ** (len(ch_mult) - 1)
        self.z_channels, self.embed_dim, self.scale_factor = z_channels, embed_dim, scale_factor
        widths = [ch * m for m in ch_mult]
        check_widths("vae", widths, num_groups=num_groups)
        self.encoder = Encoder(
            in_channels, 2 * z_channels, widths=widths, num_blocks=num_res_blocks, num_groups=num_groups
        )
        self.decoder = Decoder(
            z_channels, in_channels, widths=widths, num_blocks=num_res_blocks + 1, num_groups=num_groups
        )
        self.quant_conv = Conv1x1(2 * z_channels, 2 * embed_dim, 1)
        self.post_quant_conv = Conv1x1(embed_dim, z_channels, 1)
        self.to(memory_format=torch.channels_last)  # the faster layout for convolutions

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Pixels [B, 3, H, W] in [-1, 1] -> posterior over scaled latents [B, embed_dim, h, w]."""
        mean, log_variance = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        std = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
        scale = self.scale_factor
        return DiagonalGaussian(mean * scale, std * scale, scale_factor=scale)

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents [B, embed_dim, h, w] -> pixels [B, 3, H, W], in about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(z / self.scale_factor))
