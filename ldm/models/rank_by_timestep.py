"""T-LoRA (Soboleva et al. 2025): which ranks of a LoRA there are at a timestep."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.annotations import PositiveInt
from ldm.errors import UserError
from ldm.models.lora_layer import LoRALayer


@dataclass(frozen=True)
class RankByTimestep:
    """T-LoRA (Soboleva et al. 2025, arXiv 2507.05964): fewer ranks at noisier timesteps, in the UNet.

    Of T timesteps, t has the first floor((rank - min_rank) (T - t) / T) + min_rank ranks (sec. 4.1), each
    item of a batch its own. The text encoder, whose prompts have no timestep, has all ranks.

    min_rank: at the noisiest timestep; None: half of the rank.
    orthogonal: the factors begin orthonormal (`OrthogonalLoRALayer`).
    """

    min_rank: PositiveInt | None = None
    orthogonal: bool = True

    def lowest(self, rank: int) -> int:
        """Ranks at the noisiest timestep. Raises UserError for more than there are."""
        lowest = max(1, rank // 2) if self.min_rank is None else self.min_rank
        if lowest > rank:
            where, remedy = "lora.rank_by_timestep.min_rank", f"Choose {rank} or less."
            raise UserError(f"{lowest} ranks are more than the LoRA's {rank}", where=where, remedy=remedy)
        return lowest


class RankMasks:
    """Forward pre-hook of a UNet: gives LoRA layers the ranks of the items' timesteps."""

    def __init__(self, layers: Sequence[LoRALayer], *, rank: int, min_rank: int, timesteps: int):
        self.layers = list(layers)
        self.rank = rank
        self.min_rank = min_rank
        self.timesteps = timesteps

    @property
    def ranks(self) -> dict[str, int]:
        """The numbers that it is made of, by name."""
        return {"rank": self.rank, "min_rank": self.min_rank, "timesteps": self.timesteps}

    def mask(self, t: Tensor) -> Tensor:
        """t: [b], whole or not -> [b, rank] of 1 for the ranks that there are, else 0."""
        share = (self.timesteps - t.float()) * (self.rank - self.min_rank) / self.timesteps
        ranks = (share.floor() + self.min_rank).clamp(self.min_rank, self.rank)
        return (torch.arange(self.rank, device=t.device) < ranks[:, None]).float()

    def __call__(self, unet: nn.Module, inputs: tuple) -> None:
        if not any(layer.enabled for layer in self.layers):
            return  # the base's prediction; masks of another pass may be needed in its backward pass
        mask = self.mask(inputs[1])
        for layer in self.layers:
            layer.mask = mask
