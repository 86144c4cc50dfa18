"""The prompts and captions of a run, read before it begins by the vocabulary that it will have."""

from pathlib import Path

from ldm.config import instantiate
from ldm.data.caption_length import by_place, check_lengths, prompts_of
from ldm.data.concepts import filled_templates, rows_of_template
from ldm.data.dreambooth import DreamBoothDataModule
from ldm.models.vocabulary import local_vocabulary
from ldm.runs import run
from ldm.schema import RunConfig
from ldm.training.latent_diffusion import LatentDiffusion


def all_prompts(config: RunConfig, data: DreamBoothDataModule) -> dict[str, str]:
    """The prompts and captions of a run, by where they stand: a key of the config, or a file."""
    samples = filled_templates(config.samples.prompts, data.concepts)
    return prompts_of(data) | by_place((f"samples.prompts.{k}", c.name, text) for k, c, text in samples)


def sample_rows(config: RunConfig, template: str) -> dict[str, int]:
    """The prompts that one template of a config's samples becomes -> the numbers of their rows of samples."""
    return rows_of_template(template, config.samples.prompts, instantiate(config.data).concepts)


def check_prompts(
    config: RunConfig,
    module: LatentDiffusion,
    data: DreamBoothDataModule,
    vocabulary: Path | None,
    *,
    download: bool,
) -> None:
    """Raises UserError for a new word that is known already, and for a prompt whose identifier is cut off.

    vocabulary: the base's own. download: a vocabulary that is not on this machine; else nothing is checked
    without one.
    """
    text_encoder = module.cond_stage_model
    run.use_vocabulary(text_encoder, vocabulary)
    if not download and local_vocabulary(text_encoder.tokenizer_name) is None:
        return
    module.add_learned_token()  # prompts may hold it
    identifiers = [concept.words["identifier"] for concept in data.concepts]
    check_lengths(all_prompts(config, data), text_encoder, identifiers=identifiers)
