"""What a run on the storybook asks of it that it cannot do: said at the start, and on the report."""

import logging

from ldm.data.dreambooth import DreamBoothDataModule
from ldm.data.images import ImageFiles
from ldm.errors import UserError
from ldm.evaluation.storybook import StorybookEvaluation
from ldm.evaluation.storybook_limits import UNDRAWN, reasons_against, unknown_in
from ldm.models.text_encoder import CLIPTextEncoder
from ldm.runs.prompts import all_prompts
from ldm.schema import RunConfig
from ldm.shipped import find_file
from ldm.storybook.judge import Judge
from ldm.targets import get_class

log = logging.getLogger(__name__)

TOKENIZER = "ldm/storybook/assets/tokenizer"
STYLE = "Metrics are of subjects, and a style has none"
SOME_JUDGED = "So the judge's metrics are those of the others"
PHOTOGRAPHS = (
    "Photographs need a Stable Diffusion, as with --base configs/dreambooth-sd1.yaml: see docs/tutorial.md"
)
UNJUDGED = "So there are no metrics of the judge, and what is drawn is no measure of the method"


def limits_of(config: RunConfig, text_encoder: CLIPTextEncoder, data: DreamBoothDataModule) -> list[str]:
    """Sentences on what the storybook does not know of this run, which are logged; none for other bases.

    Raises UserError if the run needs metrics that there cannot be.
    """
    evaluation = config.evaluation
    judged = bool(evaluation) and issubclass(get_class(evaluation["target"]), StorybookEvaluation)
    styles = [c.name for c in data.concepts if c.is_style] if evaluation else []
    against = _reasons_against(data) if judged or _is_storybook(text_encoder) else {}
    none_judged = len(styles) + (len(against) if judged else 0) == len(data.concepts)
    if none_judged and config.export.weights == "best":
        said = [reason for reasons in against.values() for reason in reasons] or [STYLE]
        what = f"The best weights cannot be told. {'. '.join(said)}"
        raise UserError(what, where="export.weights", remedy="Set export.weights=last.")
    notes = [f"{name}: {STYLE}" for name in styles]
    for name, reasons in against.items():
        notes += reasons if len(data.concepts) == 1 else [f"{name}: {reason}" for reason in reasons]
    if against:
        notes.append(UNJUDGED if len(styles) + len(against) == len(data.concepts) else SOME_JUDGED)
    if _is_storybook(text_encoder):
        notes += [PHOTOGRAPHS] if any(UNDRAWN in reasons for reasons in against.values()) else []
        # A class that it does not know is among the reasons
        known = [c.words[name] for c in data.concepts for name in ("identifier", "class_word")]
        notes += unknown_in(all_prompts(config, data), identifiers=known)
    for note in notes:
        log.warning("%s.", note)
    return notes


def _reasons_against(data: DreamBoothDataModule) -> dict[str, list[str]]:
    """Name of a subject that the judge cannot judge -> why."""
    judge, found = Judge.from_file(), {}
    for concept in data.concepts:
        if not concept.is_style:
            photos = ImageFiles(photo.path for photo in data.images.photos[concept.name])
            found[concept.name] = reasons_against(photos, concept.words["class_word"], judge)
    return {name: reasons for name, reasons in found.items() if reasons}


def _is_storybook(text_encoder: CLIPTextEncoder) -> bool:
    """Whether the text encoder reads the storybook's own vocabulary."""
    own, given = (find_file(name) / "vocab.json" for name in (TOKENIZER, text_encoder.tokenizer_name))
    return given.is_file() and given.read_bytes() == own.read_bytes()
