"""What the settings of prior items exclude of one another: refused by name, before any work."""

from collections.abc import Sequence
from typing import Protocol

from ldm.data.concepts import Concept, PriorClass
from ldm.errors import UserError


class PriorSettings(Protocol):
    """What a data module says of its prior items."""

    concepts: Sequence[Concept]
    classes: Sequence[PriorClass]
    generated_classes: Sequence[PriorClass]
    given_classes: Sequence[PriorClass]
    prior_batch_size: int
    online_priors: bool
    cache_latents: bool
    prior_caption_dropout: float
    diff_output_preservation: bool
    priors_show_subject: bool


def check_prior_settings(data: PriorSettings) -> None:
    """Raises UserError for prior items that there cannot be."""
    if data.online_priors and not (data.generated_classes and not data.given_classes and data.cache_latents):
        remedy = "They need num_priors, no prior_root, and cache_latents: true."
        raise UserError("Prior images cannot be generated online", where="online_priors", remedy=remedy)
    if data.diff_output_preservation and not (data.priors_show_subject and data.prior_batch_size):
        what = "Differential output preservation shows the subject's photos in the place of prior images"
        remedy = "Set num_priors=0, give no prior_root, and leave prior_batch_size."
        raise UserError(what, where="diff_output_preservation", remedy=remedy)
    for concept in data.concepts if data.diff_output_preservation else ():
        if concept.is_style:
            what = f"{concept.name} is a style, which has no class whose output could be preserved"
            remedy = "Leave the concept or this key out."
            raise UserError(what, where="diff_output_preservation", remedy=remedy)
    if data.prior_caption_dropout and not data.prior_batch_size:
        remedy = "Raise prior_batch_size, or set prior_caption_dropout to 0."
        raise UserError("There are no prior items", where="prior_caption_dropout", remedy=remedy)
    if data.prior_batch_size and not (data.classes or data.priors_show_subject):
        remedy = "Raise num_priors, give prior_root, or set prior_batch_size to 0."
        raise UserError("There are no images for prior items", where="prior_batch_size", remedy=remedy)
