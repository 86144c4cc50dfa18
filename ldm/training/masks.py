"""Masked loss: what a photo's mask leaves out is learnt less, not at all, or as the base has it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm.annotations import NonNegativeFloat
from ldm.engine.device import can_pin
from ldm.errors import UserError


@dataclass(frozen=True)
class Masks:
    """Masked loss of the subject's photos (Avrahami et al. 2023, "Break-A-Scene", sec. 3.1), by their masks.

    With a mask m in [0, 1], averaged over the area of each latent pixel, the error of a pixel weighs
    m + outside (1 - m). The loss of an item stays the mean over all pixels, as there and in kohya's trainer,
    and is not divided by the mean of the weights: what is inside has the gradient that it has without a mask,
    and a photo with a small subject a small loss. Prior items are not masked.

    With the teacher outside, the loss of a pixel is, up to a constant, m |p - noise|^2 +
    outside (1 - m) |p - base|^2: OneTrainer's masked prior preservation. As there, the base predicts under
    the item's own caption, the identifier included: it is what an untrained model would do with the prompt,
    so at the start there is nothing to learn outside.

    outside: weight of what the mask leaves out; 0 ignores it, 1 with the noise as target is no mask.
    outside_target: what is learnt there: "noise", as inside, or "teacher": the base's prediction.
    """

    outside: NonNegativeFloat
    outside_target: Literal["noise", "teacher"] = "noise"

    def __post_init__(self) -> None:
        if self.outside_target == "teacher" and not self.outside:
            what, where = (
                "The teacher's prediction outside of the masks has no weight",
                "objective.masks.outside",
            )
            raise UserError(
                what, where=where, remedy="Raise it, to 1 for instance, or set outside_target=noise."
            )

    def select(self, mask: Tensor | None, is_subject: Tensor) -> dict[str, Tensor]:
        """Additions to a batch. mask: [B, 1, h, w] in [0, 1]; is_subject: [B] bool.

        "pixel_weights" [B, 1, h, w], and with a teacher "noise_share" [B, 1, h, w]: how much of a pixel's
        target is the noise's, and the rest the base's. Raises ValueError where a batch has no masks.
        """
        if mask is None:
            raise ValueError("a masked loss needs batches with masks: DreamBoothDataModule(masks=True)")
        masked = is_subject.view(-1, 1, 1, 1)
        weights = torch.where(masked, mask + self.outside * (1 - mask), 1.0)
        found = {"pixel_weights": weights}
        if self.outside_target == "teacher":
            found["noise_share"] = torch.where(masked, mask / weights, 0.0)
        return {name: x.pin_memory() if can_pin() else x for name, x in found.items()}


def mix_targets(noise: Tensor, base: Tensor, noise_share: Tensor) -> Tensor:
    """One target whose squared error has the gradient of the weighted errors of two, and their summed weight.

    a |p - n|^2 + b |p - r|^2 = (a + b) |p - (a n + b r) / (a + b)|^2 + a constant. noise, base: [R, C, h, w];
    noise_share: a / (a + b), [R, 1, h, w].
    """
    return torch.lerp(base, noise, noise_share.to(base))


def masked_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `Masks.select` has added to a batch."""
    return {name: batch[name] for name in ("pixel_weights", "noise_share") if name in batch}
