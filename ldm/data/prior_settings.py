"""What the settings of prior items exclude of one another: refused by name, before any work."""

from typing import Protocol

from ldm.errors import UserError


class PriorSettings(Protocol):
    """What a data module says of its prior items."""

    prior_batch_size: int
    num_priors: int
    online_priors: bool
    cache_latents: bool
    prior_caption_dropout: float
    diff_output_preservation: bool
    priors_show_subject: bool
    generates_priors: bool


def check_prior_settings(data: PriorSettings) -> None:
    """Raises UserError for prior items that there cannot be."""
    if data.online_priors and not (data.generates_priors and data.cache_latents):
        remedy = "They need num_priors, no prior_root, and cache_latents: true."
        raise UserError("Prior images cannot be generated online", where="online_priors", remedy=remedy)
    if data.diff_output_preservation and not (data.priors_show_subject and data.prior_batch_size):
        what = "Differential output preservation shows the subject's photos in the place of prior images"
        remedy = "Set num_priors=0, give no prior_root, and leave prior_batch_size."
        raise UserError(what, where="diff_output_preservation", remedy=remedy)
    if data.prior_caption_dropout and not data.prior_batch_size:
        remedy = "Raise prior_batch_size, or set prior_caption_dropout to 0."
        raise UserError("There are no prior items", where="prior_caption_dropout", remedy=remedy)
    if data.generates_priors and not data.num_priors:
        remedy = "Raise num_priors, give prior_root, or set prior_batch_size to 0."
        raise UserError("There are no images for prior items", where="prior_batch_size", remedy=remedy)
