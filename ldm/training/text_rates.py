"""Learning rates of SDXL's two text encoders, each its own or 0."""

from collections.abc import Mapping

from torch import nn

from ldm.errors import UserError
from ldm.families.sdxl.family import ENCODERS
from ldm.families.sdxl.text_encoder import SDXLTextEncoders

WHERE = "model.params.trainable.text_encoder_learning_rate"


def rates_of_encoders(text_encoder: nn.Module, rate: float | Mapping[str, float]) -> dict[str, float]:
    """The rate of each encoder: {"clip_l", "clip_g"}, or {"text_encoder"} where all have one.

    Raises UserError for rates of encoders that there are not.
    """
    if not isinstance(rate, Mapping):
        return {"text_encoder": rate}
    if not isinstance(text_encoder, SDXLTextEncoders):
        remedy = "Give one number."
        raise UserError("Only Stable Diffusion XL has several text encoders", where=WHERE, remedy=remedy)
    if rate.keys() != ENCODERS.keys():
        what = f"The rates are of {', '.join(rate) or 'nothing'}"
        raise UserError(what, where=WHERE, remedy=f"Give one of {' and one of '.join(ENCODERS)}.")
    return dict(rate)


def freeze_unrated(text_encoder: nn.Module, rates: Mapping[str, float]) -> None:
    """Freezes what has a rate of 0: all of the text encoder, or the encoders whose own rate it is."""
    for key, rate in rates.items():
        if rate == 0:
            unrated = getattr(text_encoder, key) if key in ENCODERS else text_encoder
            unrated.requires_grad_(False)


def each_encoder(learner: nn.Module) -> dict[str, nn.Module]:
    """The part of each encoder: of its weights, or of the LoRA beside them, which may leave one out."""
    each = dict(getattr(learner, "embedders", learner).named_children())
    numbered = zip(ENCODERS, ("0", "1"), strict=True)
    return {key: each[number] for key, number in numbered if number in each}
