"""What a run on the storybook asks of it that it cannot do: said at the start, and on the report."""

import logging
from collections.abc import Mapping

from ldm.data.dreambooth import DreamBoothDataModule
from ldm.data.images import ImageFiles
from ldm.errors import UserError
from ldm.evaluation.storybook import StorybookEvaluation
from ldm.evaluation.storybook_limits import reasons_against, unknown_in
from ldm.models.text_encoder import CLIPTextEncoder
from ldm.schema import RunConfig
from ldm.shipped import find_file
from ldm.storybook.judge import Judge
from ldm.targets import get_class

log = logging.getLogger(__name__)

TOKENIZER = "ldm/storybook/assets/tokenizer"
UNJUDGED = "So there are no metrics of the judge, and what is drawn is no measure of the method"


def limits_of(
    config: RunConfig,
    text_encoder: CLIPTextEncoder,
    data: DreamBoothDataModule,
    prompts: Mapping[str, str],
) -> list[str]:
    """Sentences on what the storybook does not know of this run, which are logged; none for other bases.

    prompts: of samples, where they stand -> text. Raises UserError if the run needs metrics that there
    cannot be.
    """
    evaluation = config.evaluation
    judged = bool(evaluation) and issubclass(get_class(evaluation["target"]), StorybookEvaluation)
    if not judged and not _is_storybook(text_encoder):
        return []
    photos = ImageFiles(photo.path for photo in data.subject_photos)
    against = reasons_against(photos, data.words["class_word"], Judge.from_file())
    if against and judged and config.export.weights == "best":
        what = f"The best weights cannot be told. {'. '.join(against)}"
        raise UserError(what, where="export.weights", remedy="Set export.weights=last.")
    notes = [*against, UNJUDGED] if against else []
    if _is_storybook(text_encoder):
        notes += unknown_in(prompts, identifier=data.words["identifier"])
    for note in notes:
        log.warning("%s.", note)
    return notes


def _is_storybook(text_encoder: CLIPTextEncoder) -> bool:
    """Whether the text encoder reads the storybook's own vocabulary."""
    own, given = (find_file(name) / "vocab.json" for name in (TOKENIZER, text_encoder.tokenizer_name))
    return given.is_file() and given.read_bytes() == own.read_bytes()
