"""The denoising UNet of Stable Diffusion 1.x, 2.x (Rombach et al. 2022) and XL, in its released names."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.annotations import PositiveInt
from ldm.errors import UserError
from ldm.models.attention import BasicTransformerBlock, SpatialTransformer, repeat_batch, zero_init
from ldm.models.conditioning import Conditioning, index_tensor
from ldm.models.conv1x1 import Conv1x1
from ldm.models.group_norm import GroupNorm, fuse
from ldm.models.widths import check_widths, depth_of_levels


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoidal timestep embedding (Ho et al. 2020), cosines first. [B] -> [B, dim] float32."""
    half = dim // 2
    number = torch.arange(half, dtype=torch.float32, device=timesteps.device)  # whatever the default dtype is
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10000) / half * number)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


class ResBlock(nn.Module):
    """Residual block of two 3x3 convolutions, the timestep embedding added between them.

    x: [B, in_channels, h, w], shift: [B, out_channels], of the timestep -> [B, out_channels, h, w]
    """

    def __init__(self, in_channels: int, out_channels: int, *, emb_channels: int, num_groups: int):
        super().__init__()
        self.out_channels = out_channels
        norm = partial(GroupNorm, silu=True)  # Identity stands for SD's SiLU and dropout, so names are SD's
        self.in_layers = nn.Sequential(
            norm(num_groups, in_channels), nn.Identity(), conv3x3(in_channels, out_channels)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            norm(num_groups, out_channels),
            nn.Identity(),
            nn.Identity(),
            zero_init(conv3x3(out_channels, out_channels)),
        )
        if in_channels != out_channels:
            self.skip_connection = Conv1x1(in_channels, out_channels, 1)
        else:
            self.skip_connection = nn.Identity()

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        h = self.in_layers(x) + shift[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class TimeEmbedding(NamedTuple):
    """The timesteps of b latents as blocks take them: emb [b, E], or what each block makes of it, kept."""

    emb: Tensor
    kept: Mapping[ResBlock, Tensor] | None = None  # [b, out_channels] each

    def shift(self, block: ResBlock, rows: int) -> Tensor:
        """-> [rows, out_channels], over and over the same b."""
        if self.kept is not None:
            return repeat_batch(self.kept[block], rows)
        return block.emb_layers(repeat_batch(self.emb, rows))


class Downsample(nn.Module):
    """Downsampling by a stride-2 convolution. [B, C, h, w] -> [B, C, h/2, w/2]."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, then a convolution. [B, C, h, w] -> [B, C, 2h, 2w]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.Sequential):
    """Sequential layers: residual blocks also get the timestep embedding, transformers the conditioning."""

    def forward(self, x: Tensor, time: TimeEmbedding, conditioning: Conditioning) -> Tensor:
        for layer in self:
            match layer:
                case ResBlock():
                    x = layer(x, time.shift(layer, len(x)))
                case SpatialTransformer():
                    x = layer(x, conditioning)
                case _:
                    x = layer(x)
        return x


def _mlp(in_features: int, emb: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_features, emb), nn.SiLU(), nn.Linear(emb, emb))


class Prepared(NamedTuple):
    """What the steps of one sampling share: conditioning, S timesteps, and what layers make of them.

    conditioning: with keys and values, if they can be kept. shifts: [S, sum of out_channels], a block's in
    its columns; [P S, sum] where prompts have vectors. timesteps: [S] float32. index: [B], prompts of items.
    """

    conditioning: Conditioning
    shifts: Tensor
    timesteps: Tensor
    index: Tensor
    blocks: Sequence[ResBlock]

    def select(self, prompt_index: Sequence[int]) -> Self:
        """For B items; prompt_index: [B], which of the P prompts that were prepared each has."""
        index = index_tensor(prompt_index, self.index.device)
        return self._replace(conditioning=self.conditioning.select(index), index=index)

    def tensors(self) -> list[Tensor]:
        """All that differ from sampling to sampling."""
        return [*self.conditioning.tensors(), self.shifts, self.timesteps, self.index]

    def clone(self) -> Self:
        """The same with memory of its own."""
        return type(self)(*(part.clone() for part in self[:-1]), self.blocks)

    def time_embedding(self, timesteps: Tensor) -> TimeEmbedding:
        """timesteps: [b], of those prepared for; an error of the device where one is not.

        -> of b items, or, where each prompt has a vector, of the B that this is for.
        """
        first = 0
        if self.conditioning.vector is not None:
            first = self.index * len(self.timesteps)
            timesteps = repeat_batch(timesteps, len(first))
        same = timesteps.float()[:, None] == self.timesteps  # [b or B, S]
        row = torch.where(same.any(dim=1), first + same.int().argmax(dim=1), len(self.shifts))
        shifts = self.shifts.index_select(0, row)
        widths = [block.out_channels for block in self.blocks]
        return TimeEmbedding(shifts, dict(zip(self.blocks, shifts.split(widths, dim=1), strict=True)))


class UNetModel(nn.Module):
    """Denoising UNet: predicts the noise (or v, or x0) in latents, given the timestep and the prompt.

    in_channels, out_channels: of latents. model_channels: width of the first level.
    channel_mult: width of each level over `model_channels`; level l works on h / 2**l cells.
    attention_resolutions: the downsampling factors (1, 2, 4, ...) that have transformers.
    num_res_blocks: residual blocks of each level. num_heads: of every attention.
    context_dim: width of the text encoder's output. transformer_depth: blocks of each transformer, or of
        those of each level (SDXL: 1, 2, 10, the first of a level without any); the last is the middle's too.
    adm_in_channels: width of the vector beside the timestep (SDXL: pooled text and sizes); None: no vector.
    use_linear_in_transformer: its outer projections are linear layers (SD 2.x), not convolutions.
    num_groups: of group norms.
    num_head_channels: width of a head (SD 2.x); where given, it replaces `num_heads` (SD 1.x).
    use_checkpoint: gradient checkpointing of every stage, or of those at the listed downsampling factors,
        such as [1, 2]. None: a training run chooses; else none.
    fused_group_norm: on a GPU, group norm and SiLU in one Triton kernel, where Triton is installed.
    """

    def __init__(
        self,
        *,
        in_channels: PositiveInt = 4,
        out_channels: PositiveInt = 4,
        model_channels: PositiveInt = 320,
        channel_mult: Sequence[PositiveInt] = (1, 2, 4, 4),
        num_res_blocks: PositiveInt = 2,
        attention_resolutions: Sequence[PositiveInt] = (4, 2, 1),
        num_heads: PositiveInt = 8,
        num_head_channels: PositiveInt | None = None,
        context_dim: PositiveInt = 768,
        transformer_depth: PositiveInt | Sequence[PositiveInt] = 1,
        adm_in_channels: PositiveInt | None = None,
        use_linear_in_transformer: bool = False,
        use_checkpoint: bool | Sequence[int] | None = False,
        num_groups: PositiveInt = 32,
        fused_group_norm: bool = True,
    ):
        super().__init__()
        widths = [mult * model_channels for mult in channel_mult]
        check_widths("unet", [model_channels, *widths], num_groups=num_groups)
        attended = [
            width
            for level, width in enumerate(widths)
            if 2**level in attention_resolutions or level == len(widths) - 1
        ]
        heads = {"num_head_channels": num_head_channels} if num_head_channels else {"num_heads": num_heads}
        check_widths("unet", attended, **heads)
        depths = depth_of_levels(transformer_depth, levels=len(widths))
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.context_dim = context_dim
        self.adm_in_channels = adm_in_channels
        self.use_checkpoint = use_checkpoint
        self.factor = 2 ** (len(channel_mult) - 1)
        self.shares_keys = True  # keys and values of a prompt are the same at all timesteps
        emb = 4 * model_channels
        res_block = partial(ResBlock, emb_channels=emb, num_groups=num_groups)

        def transformer(width: int, level: int) -> SpatialTransformer:
            return SpatialTransformer(
                width,
                num_heads=width // num_head_channels if num_head_channels else num_heads,
                context_dim=context_dim,
                depth=depths[level],
                use_linear=use_linear_in_transformer,
                num_groups=num_groups,
            )

        def stage(in_width: int, out_width: int, level: int) -> Stage:
            attention = [transformer(out_width, level)] if 2**level in attention_resolutions else []
            return Stage(res_block(in_width, out_width), *attention)

        self.time_embed = _mlp(model_channels, emb)
        if adm_in_channels is not None:
            self.label_emb = nn.Sequential(_mlp(adm_in_channels, emb))
        width = model_channels
        self.input_blocks = nn.ModuleList([Stage(conv3x3(in_channels, width))])
        skips = [width]  # widths of the skip connections to the output blocks
        for level, level_width in enumerate(widths):
            if level > 0:
                self.input_blocks.append(Stage(Downsample(width)))
                skips.append(width)
            for _ in range(num_res_blocks):
                self.input_blocks.append(stage(width, width := level_width, level))
                skips.append(width)
        self.middle_block = Stage(res_block(width, width), transformer(width, -1), res_block(width, width))
        self.output_blocks = nn.ModuleList()
        for level, level_width in reversed(list(enumerate(widths))):
            for _ in range(num_res_blocks + 1):
                self.output_blocks.append(stage(width + skips.pop(), width := level_width, level))
            if level > 0:
                self.output_blocks[-1].append(Upsample(width))

        last = zero_init(conv3x3(width, out_channels))
        self.out = nn.Sequential(GroupNorm(num_groups, width, silu=True), nn.Identity(), last)
        fuse(self, fused_group_norm)
        self.to(memory_format=torch.channels_last)  # the faster layout for convolutions

    def prepare(self, conditioning: Conditioning, timesteps: Tensor) -> Prepared:
        """Conditioning of P prompts, timesteps: [S] -> what `predict` takes in the conditioning's place.

        What depends on them alone is then computed once for all steps of a sampling.
        """
        told = conditioning.to(self.dtype)
        layers = [layer.attn2 for layer in self.modules() if isinstance(layer, BasicTransformerBlock)]
        blocks = [layer for layer in self.modules() if isinstance(layer, ResBlock)]
        timesteps = timesteps.to(told.context.device, torch.float32)
        emb = self._sinusoids(timesteps, self.dtype)
        if self._takes(told.vector):
            emb = (self.label_emb(told.vector)[:, None] + emb).flatten(0, 1)
        kept = {layer: layer.keys_values(told.context) for layer in layers if self.shares_keys} or None
        return Prepared(
            told._replace(kept=kept),
            shifts=torch.cat([block.emb_layers(emb) for block in blocks], dim=1),
            timesteps=timesteps,
            index=torch.arange(told.items, device=timesteps.device),
            blocks=blocks,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, in which it computes."""
        return self.time_embed[0].weight.dtype

    def predict(self, x: Tensor, timesteps: Tensor, conditioning: Conditioning | Prepared) -> Tensor:
        """`forward` in the network's own precision, whatever that of x and of the conditioning is."""
        if isinstance(conditioning, Conditioning):
            conditioning = conditioning.to(self.dtype)
        return self(x.to(self.dtype), timesteps, conditioning)

    def forward(self, x: Tensor, timesteps: Tensor, conditioning: Conditioning | Prepared) -> Tensor:
        """x: [b, C, h, w], timesteps: [b], whole or not, conditioning of B items -> [B, C, h, w].

        b less than B is for guidance: x is repeated for each of the B / b runs of items, but only at the
        first cross-attention, so the layers before it run once; where items have a vector, at the entrance.
        """
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            remedy = f"Height and width must be multiples of {self.factor} cells."
            what = f"Latents of {x.shape[2]} x {x.shape[3]} cells do not fit the UNet"
            raise UserError(what, remedy=remedy)
        x = x.contiguous(memory_format=torch.channels_last)  # as the weights are
        if isinstance(conditioning, Prepared):
            time, conditioning = conditioning.time_embedding(timesteps), conditioning.conditioning
        else:
            time = self._time_embedding(timesteps, conditioning.vector, x.dtype)
        if self.adm_in_channels is not None:
            x = repeat_batch(x, conditioning.items)
        skips = []
        h, height = x, x.shape[2]
        for stage in self.input_blocks:
            h = self._run(stage, h, time, conditioning, height // h.shape[2])
            skips.append(h)
        h = self._run(self.middle_block, h, time, conditioning, height // h.shape[2])
        for stage in self.output_blocks:
            h = torch.cat([h, repeat_batch(skips.pop(), len(h))], dim=1)
            h = self._run(stage, h, time, conditioning, height // h.shape[2])
        return self.out(h)

    def _time_embedding(self, timesteps: Tensor, vector: Tensor | None, dtype: torch.dtype) -> TimeEmbedding:
        """timesteps: [b] -> of b items; given a vector [B, V], of B."""
        emb = self._sinusoids(timesteps, dtype)
        if self._takes(vector):
            emb = repeat_batch(emb, len(vector)) + self.label_emb(vector)
        return TimeEmbedding(emb)

    def _sinusoids(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        return self.time_embed(timestep_embedding(timesteps, self.model_channels).to(dtype))

    def _takes(self, vector: Tensor | None) -> bool:
        """Whether there is a vector beside the timestep. ValueError for one that does not fit."""
        width = None if vector is None else vector.shape[1]
        if width != self.adm_in_channels:
            wanted = f"a vector of width {self.adm_in_channels}" if self.adm_in_channels else "no vector"
            raise ValueError(f"this UNet takes {wanted} of an item, not {width}")
        return vector is not None

    def recomputes(self, factor: int) -> bool:
        """Whether the stages at this downsampling factor use gradient checkpointing."""
        chosen = self.use_checkpoint
        return chosen if isinstance(chosen, bool) else factor in (chosen or ())

    def _run(
        self, stage: Stage, x: Tensor, time: TimeEmbedding, conditioning: Conditioning, factor: int
    ) -> Tensor:
        if self.recomputes(factor) and torch.is_grad_enabled():
            return checkpoint(stage, x, time, conditioning, use_reentrant=False, preserve_rng_state=False)
        return stage(x, time, conditioning)
