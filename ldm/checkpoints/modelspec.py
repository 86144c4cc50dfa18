"""What a model file says about itself, for people and for programs: text in its metadata.

`modelspec.*` are the keys of Stability AI's ModelSpec 1.0.0, which model browsers read; `ldm.*` are ours.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

ARCHITECTURES = {  # (width of the UNet's first level, width of its context, parameterization)
    (320, 768, "eps"): "stable-diffusion-v1",
    (320, 1024, "eps"): "stable-diffusion-v2-512",
    (320, 1024, "v"): "stable-diffusion-v2-768-v",
}
OTHER_ARCHITECTURE = "latent-diffusion"
PREDICTION_TYPES = {"eps": "epsilon", "v": "v"}
IMPLEMENTATION = "https://github.com/CompVis/stable-diffusion"  # whose tensor names the file has
CLIP_VOCABULARY = 49408
PRIVATE = ("_root", "folder", "cache", "base_checkpoint", "base_parts")  # ends of keys with paths
DRAWING = {"sampler": "ddim", "steps": 50, "guidance_scale": 7.5}  # Stable Diffusion's usual ones
SAID = "_config"  # end of the keys of networks, which `ldm.config` holds


def file_metadata(
    config: Mapping[str, Any],
    *,
    title: str,
    size: int,
    trigger_phrase: str | None = None,
    base_sha256: str | None = None,
    training: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """The metadata of a single file.

    config: the model's params, each explicit (`geometry.model_config`). size: pixels a side. trigger_phrase:
    the words that call the subject up. base_sha256: of the model that was trained on. training: the run's
    config.
    """
    unet, parameterization = config["unet_config"]["params"], config["parameterization"]
    family = (unet["model_channels"], unet["context_dim"], parameterization)
    about = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": ARCHITECTURES.get(family, OTHER_ARCHITECTURE),
        "modelspec.implementation": IMPLEMENTATION,
        "modelspec.title": title,
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        "modelspec.resolution": f"{size}x{size}",
        "ldm.config": json.dumps(_portable(config)),
        "ldm.size": str(size),
    }
    if parameterization in PREDICTION_TYPES:
        about["modelspec.prediction_type"] = PREDICTION_TYPES[parameterization]
    if trigger_phrase is not None:
        about["modelspec.trigger_phrase"] = trigger_phrase
    if base_sha256 is not None:
        about["ldm.base_sha256"] = base_sha256
    if training is not None:
        about["ldm.training"] = json.dumps(_shareable(training))
    return about


def taught_words(metadata: Mapping[str, str]) -> dict[str, str | None]:
    """The identifier and the class_word of the subject a file was taught; None where it does not say."""
    training = json.loads(metadata.get("ldm.training", "{}"))
    class_word = training.get("data", {}).get("params", {}).get("class_word")
    trigger = metadata.get("modelspec.trigger_phrase", "")
    taught = class_word is not None and trigger.endswith(f" {class_word}")
    return {
        "identifier": trigger.removesuffix(f" {class_word}") if taught else None,
        "class_word": class_word,
    }


def usual_drawing(metadata: Mapping[str, str]) -> dict[str, str | int | float]:
    """Sampler, steps and guidance scale that suit a file: those of its run's samples, else `DRAWING`."""
    samples = json.loads(metadata.get("ldm.training", "{}")).get("samples") or {}
    return {name: samples.get(name, value) for name, value in DRAWING.items()}


def _shareable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's config without the paths of somebody's machine."""
    kept = {key: value for key, value in config.items() if not key.endswith((*PRIVATE, SAID))}
    return {key: _shareable(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without the place of a vocabulary that everybody has."""
    text = dict(config["cond_stage_config"]["params"])
    if text["vocab_size"] == CLIP_VOCABULARY:
        text.pop("tokenizer", None)
    return {**config, "cond_stage_config": {**config["cond_stage_config"], "params": text}}
