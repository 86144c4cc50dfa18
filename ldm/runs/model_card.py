"""The model card of a run (Mitchell et al. 2019): README.md beside its model, which the hub shows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, ModelCardData
from safetensors import safe_open

from ldm.checkpoints.hub import SITE, HubModel
from ldm.errors import UserError
from ldm.files import atomic_write
from ldm.reports.metric_rows import BESIDE, metric_rows
from ldm.reports.render import render
from ldm.runs.run_facts import TrainingFacts
from ldm.sampler_nodes import sampler_label
from ldm.schema import RunConfig
from ldm.shipped import PACKAGE, find_file

CARD = "README.md"
PICTURES = "samples/contact_sheet.png"
CHECK = "That is the released model's; a fine-tune of it may have another, which its page names."


class Licence(NamedTuple):
    """key: as the hub knows it. text: a sentence with a link, and what the licence restricts."""

    key: str
    text: str


def _restricted(key: str, name: str, link: str) -> Licence:
    restricts = "restricts what the model, its fine-tunes and their output may be used for (attachment A)"
    return Licence(key, f"[{name}]({link}), which {restricts} and is to be passed on with it. {CHECK}")


PLUS_PLUS = f"{SITE}/stabilityai/stable-diffusion-xl-base-1.0/blob/main/LICENSE.md"
SD2 = _restricted("openrail++", "CreativeML Open RAIL++-M", PLUS_PLUS)
LICENCES = {  # by the architecture in the file's metadata
    "stable-diffusion-v1": _restricted(
        "creativeml-openrail-m",
        "CreativeML OpenRAIL-M",
        f"{SITE}/spaces/CompVis/stable-diffusion-license",
    ),
    "stable-diffusion-v2-512": SD2,
    "stable-diffusion-v2-768-v": SD2,
    "stable-diffusion-xl-v1-base": SD2,
}
STORYBOOK = Licence("mit", "MIT, as all of the storybook, the drawn world that it knows.")
UNKNOWN = Licence("other", "not known here: see the page of the base, and name it at the top of this card.")
FILES = {  # kind of file -> how it is used
    "model.safetensors": "the whole model, for AUTOMATIC1111, ComfyUI and diffusers (`from_single_file`).",
    "loras/*.safetensors": "the LoRA alone, for the base: `<lora:{stem}:1>` in AUTOMATIC1111, "
    "`load_lora_weights` in diffusers.",
    "embeddings/*.safetensors": "the learned token `{stem}`, to be loaded beside the model.",
}


def write_card(folder: Path, config: RunConfig, metrics: Mapping[str, Any], training: TrainingFacts) -> Path:
    """Writes the card of a finished run from its config, metrics and files -> its path."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata() or {}
    licence = licence_of(config, metadata)
    trigger = metadata.get("modelspec.trigger_phrase", "")
    files, base = files_of(folder), base_of(config)
    data = ModelCardData(
        license=licence.key,
        base_model=hub_id_of(base),
        pipeline_tag="text-to-image",
        tags=["dreambooth", "text-to-image", *(["lora"] if any("loras/" in name for name in files) else [])],
        instance_prompt=trigger,
    )
    samples = config.samples
    card = ModelCard(
        render(
            "model_card.md",
            card_data=data.to_yaml(),
            title=folder.name,
            kind="A LoRA" if "lora" in data.tags else "A fine-tune",
            base=hub_id_of(base) or Path(base or "").name,
            base_sha=metadata.get("ldm.base_sha256", "")[:12],
            trigger=trigger,
            pictures=PICTURES if (folder / PICTURES).exists() else "",
            files=files,
            sampling=f"{sampler_label(samples.sampler)}, {samples.steps} steps, "
            f"guidance {samples.guidance_scale:g}",
            metrics=cells_of(metrics),
            notes=metrics.get("notes", []),
            facts=facts_of(config, training),
            licence=licence.text,
        )
    )
    with atomic_write(folder / CARD) as temporary:
        temporary.write_text(str(card), encoding="utf-8")
    return folder / CARD


def licence_of(config: RunConfig, metadata: Mapping[str, str]) -> Licence:
    """The licence of the base, by where it lies or what it is."""
    base = find_file(base_of(config) or "").resolve()
    if PACKAGE in base.parents:
        return STORYBOOK
    return LICENCES.get(metadata.get("modelspec.architecture", "").partition("/")[0], UNKNOWN)


def base_of(config: RunConfig) -> str | None:
    """The base whose UNet was trained, a file or a hub id; None for a network from nothing."""
    return (config.base_parts or {}).get("unet") or config.base_checkpoint


def hub_id_of(base: str | None) -> str | None:
    """`owner/name` if that is what a base is called, and not a file or folder here; else None."""
    model = HubModel.of(find_file(base)) if base else None
    return None if model is None else model.repo


def files_of(folder: Path) -> dict[str, str]:
    """Weights of a run, relative to its folder -> how they are used."""
    found = {}
    for pattern, how in FILES.items():
        for path in sorted(folder.glob(pattern)):
            found[path.relative_to(folder).as_posix()] = how.replace("{stem}", path.stem)
    if not found:
        raise UserError("The run has no model yet", where=folder, remedy="Continue it: --resume RUN.")
    return found


def cells_of(metrics: Mapping[str, Any]) -> list[list[str]]:
    """Name, value, interval, base, photos and noise floor of each metric; what is not known is empty."""
    rows = []
    for row in metric_rows(metrics):
        if row.beside:
            numbers = [f"{row.beside[key]:.3f}" if key in row.beside else "" for key in BESIDE]
            rows.append([row.name.replace("_", " "), f"{row.value:.3f}", row.interval, *numbers])
    return rows


def facts_of(config: RunConfig, training: TrainingFacts) -> dict[str, str]:
    """What the card says of the training: nothing of paths, which may be private."""
    facts = {
        "steps": training.step_text,
        "weights": training.weights_text,
        "photos a step": str(training.photos_a_step),
        "pixels": str(config.data["params"]["size"]),
        "learning rates": training.rate_text,
        "prior images": training.prior_text,
        "precision": config.trainer.precision,
        "seed": str(config.seed),
    }
    return {name: value for name, value in facts.items() if value}
