"""SDXL's vector of an item: pooled text, and six numbers of its size and crop (Podell et al. 2023, 2.2)."""

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.models.unet import UNetModel, timestep_embedding

log = logging.getLogger(__name__)
NUMBER_WIDTH = 256  # sinusoids of each number
LEAST_SIDE = 512  # pixels


class Sizes(NamedTuple):
    """In pixels: (height, width) of the original image before scaling, (top, left) of the crop in the scaled
    one, and (height, width) of the image that is trained on or sampled."""

    original: tuple[int, int]
    crop: tuple[int, int]
    target: tuple[int, int]

    @classmethod
    def of_sample(cls, height: int, width: int) -> "Sizes":
        """What a sampled image usually is told to be: an uncropped original of its own size."""
        return cls((height, width), (0, 0), (height, width))

    @classmethod
    def for_unet(cls, sizes: "Sizes | None", height: int, width: int, *, unet: UNetModel) -> "Sizes | None":
        """What a UNet is told of samples of this size: `sizes`, or what is usual. None: it takes no vector.

        Raises UserError for sizes given to a UNet that takes none.
        """
        if unet.adm_in_channels is not None:
            return sizes or cls.of_sample(height, width)
        if sizes is not None:
            what = "Only Stable Diffusion XL is told an original size, a crop and a target size"
            raise UserError(what, where="sizes", remedy="Leave them out.")
        return None

    def numbers(self) -> list[int]:
        """[6] in the order in which the UNet takes them."""
        return [*self.original, *self.crop, *self.target]


def warn_of_small_side(side: int, *, where: str) -> None:
    """Logs a warning of images whose shorter side is less than SDXL was trained at."""
    if side < LEAST_SIDE:
        log.warning("%s %d: SDXL draws badly below %d pixels", where, side, LEAST_SIDE)


def vector_width(pooled: int) -> int:
    """The width of the UNet's vector, by that of the pooled one."""
    return pooled + len(Sizes.of_sample(1, 1).numbers()) * NUMBER_WIDTH


def size_vector(pooled: Tensor, sizes: Tensor) -> Tensor:
    """pooled: [B, P], sizes: [B, 6] -> the UNet's vector [B, P + 6 * 256], float32.

    Sizes must not be in half precision: bfloat16 has no 1003, and the sinusoids differ for 1004.
    """
    numbers = timestep_embedding(sizes.flatten().to(pooled.device), NUMBER_WIDTH)  # [B 6, 256]
    return torch.cat([pooled.float(), numbers.unflatten(0, sizes.shape).flatten(1)], dim=1)
