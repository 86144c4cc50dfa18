"""Metadata of model files.

`modelspec.*` are the keys of Stability AI's ModelSpec 1.0.0, which model browsers read; `ldm.*` are ours.
"""

import copy
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import PureWindowsPath
from typing import Any

from ldm.checkpoints.known import training_of
from ldm.families.family import Family
from ldm.families.sdxl.family import encoder_params

ARCHITECTURES = {  # (width of the UNet's first level, width of its context, parameterization)
    (320, 768, "eps"): "stable-diffusion-v1",
    (320, 1024, "eps"): "stable-diffusion-v2-512",
    (320, 1024, "v"): "stable-diffusion-v2-768-v",
    (320, 2048, "eps"): "stable-diffusion-xl-v1-base",
    (320, 2048, "v"): "stable-diffusion-xl-v1-base",
}
OTHER_ARCHITECTURE = "latent-diffusion"
PREDICTION_TYPES = {"eps": "epsilon", "v": "v"}
IMPLEMENTATION = "https://github.com/CompVis/stable-diffusion"  # whose tensor names the file has
XL_IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"
CLIP_VOCABULARY = 49408
PRIVATE = ("root", "folder", "captions", "cache", "base_checkpoint", "base_parts")  # keys with paths end so
WORDS = ("name", "class_word", "identifier", "sampler", "spacing")  # keys without, whatever is called alike
SAMPLING_DEFAULTS = {  # usual ones; spacing None: as suits the sampler
    "sampler": "ddim",
    "spacing": None,
    "steps": 50,
}
KINDS = {
    "sampler": (str, dict),  # a short name, or the node of somebody's own
    "spacing": (str, type(None)),
    "steps": (int,),
    "guidance_scale": (int, float),
}
BY_CONFIG = (  # keys that a model's config decides, also where it leaves one out; the others are facts
    "modelspec.architecture",
    "modelspec.encoder_layer",
    "modelspec.implementation",
    "modelspec.prediction_type",
    "modelspec.resolution",
    "ldm.config",
    "ldm.size",
)
NETWORKS = ("unet", "vae", "text_encoder")  # keys of nodes that `ldm.config` holds


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

    config: the model's params, each explicit (`infer_config.model_config`). size: pixels a side.
    trigger_phrase: names the subject in prompts. base_sha256: of the base model. training: the run's config.
    """
    unet, parameterization = config["unet"]["params"], config["parameterization"]
    family = (unet["model_channels"], unet["context_dim"], parameterization)
    about = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": ARCHITECTURES.get(family, OTHER_ARCHITECTURE),
        "modelspec.implementation": XL_IMPLEMENTATION if unet.get("adm_in_channels") else IMPLEMENTATION,
        "modelspec.title": title,
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        "modelspec.resolution": f"{size}x{size}",
        "ldm.config": json.dumps(_portable(config)),
        "ldm.size": str(size),
    }
    if parameterization in PREDICTION_TYPES:
        about["modelspec.prediction_type"] = PREDICTION_TYPES[parameterization]
    clip_skip = config["text_encoder"]["params"].get("clip_skip", 1)
    if clip_skip > 1:
        about["modelspec.encoder_layer"] = str(clip_skip)
    if trigger_phrase is not None:
        about["modelspec.trigger_phrase"] = trigger_phrase
    if base_sha256 is not None:
        about["ldm.base_sha256"] = base_sha256
    if training is not None:
        about["ldm.training"] = json.dumps(_shareable(training))
    return about


def with_config_of(metadata: Mapping[str, str], about: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a file that is written with another config: what that decides is as in `about`.

    metadata: of the source, whose title, author, licence, hashes and training stay. about: `file_metadata`
    by the config. Another tool's finer name of the architecture stays, and a resolution of the same width.
    """
    kept = {key: text for key, text in metadata.items() if key not in BY_CONFIG}
    architecture, resolution = (
        metadata.get(f"modelspec.{key}", "") for key in ("architecture", "resolution")
    )
    if architecture and architecture not in (*ARCHITECTURES.values(), OTHER_ARCHITECTURE):
        kept["modelspec.architecture"] = architecture
    if resolution.partition("x")[0] == about["ldm.size"]:
        kept["modelspec.resolution"] = resolution
    return {**about, **kept}


def taught_words(metadata: Mapping[str, str]) -> dict[str, str | None]:
    """Identifier and class_word of the subject that a file was trained on; None where it does not say."""
    class_word = _section(_section(training_of(metadata), "data"), "params").get("class_word")
    class_word = class_word if isinstance(class_word, str) else None
    trigger = metadata.get("modelspec.trigger_phrase", "")
    taught = class_word is not None and trigger.endswith(f" {class_word}")
    return {
        "identifier": trigger.removesuffix(f" {class_word}") if taught else None,
        "class_word": class_word,
    }


def sampling_defaults(metadata: Mapping[str, str], family: Family) -> dict[str, Any]:
    """Sampler, spacing, steps and guidance scale that suit a file: its run's, else usual ones."""
    usual = SAMPLING_DEFAULTS | {"guidance_scale": family.guidance_scale}
    samples = _section(training_of(metadata), "samples")
    return {
        name: samples[name] if name in samples and type(samples[name]) in KINDS[name] else value
        for name, value in usual.items()
    }


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = config.get(key)
    return section if isinstance(section, dict) else {}


def _shareable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's config without paths and without the networks."""
    kept = {
        key: value
        for key, value in config.items()
        if not key.endswith(PRIVATE)
        and not (key in NETWORKS and isinstance(value, dict))
        and (key in WORDS or not _is_path(value))
    }
    return {key: _without_paths(value) for key, value in kept.items()}


def _without_paths(value: Any) -> Any:
    """`_shareable` of a mapping, also in lists."""
    if isinstance(value, list):
        return [_without_paths(item) for item in value if not _is_path(item)]
    return _shareable(value) if isinstance(value, dict) else value


def _is_path(value: Any) -> bool:
    """Whether a value is the path of a file or folder, of this machine or of any; a bare word is none."""
    if not isinstance(value, str):
        return False
    if value.startswith(("/", "~")) or PureWindowsPath(value).is_absolute():
        return True
    return ("/" in value or "." in value) and os.path.exists(value)


def _portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config without the path of CLIP's vocabulary, which every tool has."""
    config = copy.deepcopy(dict(config))
    for text in encoder_params(config["text_encoder"]["params"]):
        if text["vocab_size"] == CLIP_VOCABULARY:
            text.pop("tokenizer", None)
    return config
