"""Whether what a run learns from, the loss and the photos, go together."""

import logging

from ldm.data.caption_length import prompts_of
from ldm.data.dreambooth import DreamBoothDataModule
from ldm.errors import UserError
from ldm.training.latent_diffusion import LatentDiffusion

log = logging.getLogger(__name__)


def check_objective(module: LatentDiffusion, data: DreamBoothDataModule) -> None:
    """Raises UserError for a loss, or a new word, that these photos, masks and concepts cannot have.

    Warns of prior items whose loss has no weight.
    """
    _check_prior_target(module, data)
    _warn_of_no_weight(module, data)
    _check_masks(module, data)
    _check_learned_token(module, data)
    _check_styles(module, data)


def _check_prior_target(module: LatentDiffusion, data: DreamBoothDataModule) -> None:
    """Refuses other captions on the subject's photos without a teacher: they would train the subject."""
    if data.priors_show_subject and module.objective.streams["prior"].target != "teacher":
        where = "diff_output_preservation" if data.diff_output_preservation else "prior_caption_dropout"
        what = "Without prior images, prior items need the teacher's prediction as their target"
        remedy = "Set model.params.objective.prior_target=teacher, or raise data.params.num_priors."
        raise UserError(what, where=where, remedy=remedy)


def _warn_of_no_weight(module: LatentDiffusion, data: DreamBoothDataModule) -> None:
    """Says that prior items fill half of each batch for a loss times 0."""
    if data.prior_batch_size and module.objective.streams["prior"].weight == 0:
        log.warning(
            "model.params.objective.prior_loss_weight=0: prior items fill half of each batch, and nothing is "
            "learnt from them; data.params.num_priors=0 data.params.prior_caption_dropout=0 saves that"
        )


def _check_masks(module: LatentDiffusion, data: DreamBoothDataModule) -> None:
    """Refuses masks that no loss uses, and a teacher of a word that it learns together with its pupil."""
    masks = module.objective.masks
    if masks is None and (data.masks or data.mask_root is not None):
        where = "data.params.masks" if data.masks else "data.params.mask_root"
        remedy = "Set model.params.objective.masks={outside: 0.1}, or take it off."
        raise UserError("There are masks, but no loss that uses them", where=where, remedy=remedy)
    shared = module.lora is not None and module.trainable.learned_token is not None
    if masks is not None and masks.outside_target == "teacher" and shared:
        what = "With a LoRA the teacher would read the learned token as it is trained"
        remedy = "Set model.params.objective.masks.outside_target=noise, or take one of the two off."
        raise UserError(what, where="model.params.trainable.learned_token", remedy=remedy)


def _check_learned_token(module: LatentDiffusion, data: DreamBoothDataModule) -> None:
    """Refuses textual inversion of several concepts, for which one word is too few, or without the word."""
    token = module.trainable.learned_token
    if token is not None and len(data.concepts) > 1:
        what = f"One new word cannot name the {len(data.concepts)} concepts of this run"
        remedy = "Take it off, or train them one at a time."
        raise UserError(what, where="model.params.trainable.learned_token", remedy=remedy)
    if token is not None and not any(token.word in text for text in prompts_of(data).values()):
        what = f"No prompt or caption has the new word {token.word}, so that nothing would be learnt"
        remedy = f"Set data.params.identifier={token.word}."
        raise UserError(what, where="model.params.trainable.learned_token", remedy=remedy)


def _check_styles(module: LatentDiffusion, data: DreamBoothDataModule) -> None:
    """Refuses a loss against the base, which is told the class, for what has none."""
    for concept in data.concepts if module.objective.subject_loss is not None else ():
        if concept.is_style:
            what = f"{concept.name} is a style, and the base would be told its class"
            remedy = "Leave the concept out, or take the loss off."
            raise UserError(what, where="model.params.objective.subject_loss", remedy=remedy)
