"""The denoising UNet of Stable Diffusion 1.x and 2.x (Rombach et al. 2022), in its released names."""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.errors import UserError
from ldm.models.attention import GroupNorm, Prompts, SpatialTransformer, index_of, repeat_rows, zero_init


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoids of periods 2 pi .. 10000 * 2 pi, cosines first. [B] -> [B, dim] float32 (Ho et al. 2020)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, device=timesteps.device))
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


class ResBlock(nn.Module):
    """Two 3x3 convolutions around a skip, the timestep added in between.

    x: [B, in_channels, h, w], emb: [B, emb_channels] -> [B, out_channels, h, w]
    """

    def __init__(self, in_channels: int, out_channels: int, *, emb_channels: int, num_groups: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            GroupNorm(num_groups, in_channels), nn.SiLU(), conv3x3(in_channels, out_channels)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            GroupNorm(num_groups, out_channels),
            nn.SiLU(),
            nn.Identity(),  # the place of SD's dropout (p = 0)
            zero_init(conv3x3(out_channels, out_channels)),
        )
        if in_channels != out_channels:
            self.skip_connection = nn.Conv2d(in_channels, out_channels, 1)
        else:
            self.skip_connection = nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Downsample(nn.Module):
    """Stride-2 convolution. [B, C, h, w] -> [B, C, h/2, w/2]."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Nearest neighbour x2, then a convolution. [B, C, h, w] -> [B, C, 2h, 2w]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.Sequential):
    """Layers in a row; hands the timestep to residual blocks and the prompt to transformers."""

    def forward(self, x: Tensor, emb: Tensor, prompts: Prompts) -> Tensor:
        for layer in self:
            match layer:
                case ResBlock():
                    x = layer(x, repeat_rows(emb, len(x)))
                case SpatialTransformer():
                    x = layer(x, prompts)
                case _:
                    x = layer(x)
        return x


class UNetModel(nn.Module):
    """Predicts the noise (or v, or x0) in noisy latents, given the timestep and the prompt.

    channel_mult: width of each level over `model_channels`; level l works on h / 2**l cells.
    attention_resolutions: the downsampling factors (1, 2, 4, ...) at which transformers follow the blocks.
    num_head_channels: width of a head (SD 2.x); where given, it replaces `num_heads` (SD 1.x).
    use_checkpoint: keep only each stage's input for the backward pass and compute the rest again; a list of
        downsampling factors ([1, 2]) does so at these alone. None: a training run chooses; else nothing.

    `fixed_shapes`, to be set where it is compiled, gives each item a context and latents of its own, as one
    more shape would be one more translation.
    """

    fixed_shapes = False

    def __init__(
        self,
        *,
        in_channels: int = 4,
        out_channels: int = 4,
        model_channels: int = 320,
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (4, 2, 1),
        num_heads: int = 8,
        num_head_channels: int | None = None,
        context_dim: int = 768,
        transformer_depth: int = 1,
        use_linear_in_transformer: bool = False,
        use_checkpoint: bool | Sequence[int] | None = False,
        num_groups: int = 32,
    ):
        super().__init__()
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.context_dim = context_dim
        self.use_checkpoint = use_checkpoint
        self.factor = 2 ** (len(channel_mult) - 1)
        emb = 4 * model_channels
        res_block = partial(ResBlock, emb_channels=emb, num_groups=num_groups)

        def transformer(width: int) -> SpatialTransformer:
            return SpatialTransformer(
                width,
                num_heads=width // num_head_channels if num_head_channels else num_heads,
                context_dim=context_dim,
                depth=transformer_depth,
                use_linear=use_linear_in_transformer,
                num_groups=num_groups,
            )

        def stage(in_width: int, out_width: int, level: int) -> Stage:
            attention = [transformer(out_width)] if 2**level in attention_resolutions else []
            return Stage(res_block(in_width, out_width), *attention)

        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        width = model_channels
        self.input_blocks = nn.ModuleList([Stage(conv3x3(in_channels, width))])
        skips = [width]  # widths of what the input blocks leave for the output blocks
        for level, mult in enumerate(channel_mult):
            if level > 0:
                self.input_blocks.append(Stage(Downsample(width)))
                skips.append(width)
            for _ in range(num_res_blocks):
                self.input_blocks.append(stage(width, width := mult * model_channels, level))
                skips.append(width)
        self.middle_block = Stage(res_block(width, width), transformer(width), res_block(width, width))
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for _ in range(num_res_blocks + 1):
                self.output_blocks.append(stage(width + skips.pop(), width := mult * model_channels, level))
            if level > 0:
                self.output_blocks[-1].append(Upsample(width))

        self.out = nn.Sequential(
            GroupNorm(num_groups, width), nn.SiLU(), zero_init(conv3x3(width, out_channels))
        )
        self.to(memory_format=torch.channels_last)  # much the faster layout for convolutions

    def predict(
        self, x: Tensor, timesteps: Tensor, context: Tensor, rows: Sequence[int] | None = None
    ) -> Tensor:
        """`forward` in the network's own precision, whatever that of x and of the context is."""
        if self.fixed_shapes and rows is not None:
            x, timesteps = repeat_rows(x, len(rows)), repeat_rows(timesteps, len(rows))
            context, rows = context.index_select(0, index_of(rows, context.device)), None
        dtype = self.time_embed[0].weight.dtype
        return self(x.to(dtype), timesteps, context.to(dtype), rows)

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor, rows: Sequence[int] | None = None
    ) -> Tensor:
        """x: [b, C, h, w], timesteps: [b] in [0, T), context: [P, M, D] -> [B, C, h, w].

        rows: [B], which of the P contexts each item has; None: its own (b = B = P). Where b is less than B
        (guidance), all of x goes with each of the B / b runs of rows; what comes before the first prompt is
        then computed once.
        """
        prompts = Prompts.of(context, rows)
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise UserError(
                f"Latents of {x.shape[2]} x {x.shape[3]} cells do not fit the UNet",
                remedy=f"Height and width must be multiples of {self.factor} cells.",
            )
        x = x.contiguous(memory_format=torch.channels_last)  # as the weights are
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(x.dtype))
        skips = []
        h, height = x, x.shape[2]
        for stage in self.input_blocks:
            h = self._run(stage, h, emb, prompts, height // h.shape[2])
            skips.append(h)
        h = self._run(self.middle_block, h, emb, prompts, height // h.shape[2])
        for stage in self.output_blocks:
            h = torch.cat([h, repeat_rows(skips.pop(), len(h))], dim=1)
            h = self._run(stage, h, emb, prompts, height // h.shape[2])
        return self.out(h)

    def recomputes(self, factor: int) -> bool:
        """Whether the backward pass computes the stages at this downsampling factor again."""
        chosen = self.use_checkpoint
        return chosen if isinstance(chosen, bool) else factor in (chosen or ())

    def _run(self, stage: Stage, x: Tensor, emb: Tensor, prompts: Prompts, factor: int) -> Tensor:
        if self.recomputes(factor) and torch.is_grad_enabled():
            return checkpoint(stage, x, emb, prompts, use_reentrant=False, preserve_rng_state=False)
        return stage(x, emb, prompts)
