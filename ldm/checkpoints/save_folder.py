"""Writing a model as a diffusers folder, for `from_pretrained` of StableDiffusionPipeline or its XL."""

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints import diffusers_config as configs
from ldm.checkpoints import diffusers_names as names
from ldm.checkpoints.folder import PROJECTION_WEIGHT, REST_FILE, XL_TEXT
from ldm.checkpoints.layout import OPENCLIP_REST
from ldm.checkpoints.save import cast_tensors, check_space, write_tensors
from ldm.errors import UserError
from ldm.families.sd.openclip import PROJECTION, without_last_layer
from ldm.families.sdxl.family import ENCODERS
from ldm.families.shapes import TEXT_MODEL
from ldm.lazy import under
from ldm.models.vocabulary_files import read_vocabulary, write_vocabulary

log = logging.getLogger(__name__)

StateDicts = Mapping[str, Mapping[str, Tensor]]
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": configs.VERSION,
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
XL_MODEL_INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "_diffusers_version": configs.VERSION,
    "feature_extractor": [None, None],
    "force_zeros_for_empty_prompt": True,
    "image_encoder": [None, None],
    **{name: MODEL_INDEX[name] for name in ("scheduler", "text_encoder", "tokenizer", "unet", "vae")},
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
}


def save_folder(
    folder: str | Path,
    state_dicts: StateDicts,
    *,
    config: Mapping[str, Any],
    tokenizer: str | Path,
    size: int,
    dtype: torch.dtype | None = torch.float32,
) -> Path:
    """Writes `state_dicts` (see `layout.split`) as a new folder, atomically -> folder.

    config: every param explicit, as in `Model.config`. tokenizer: folder of CLIP's vocabulary. size:
    default height and width of samples, in pixels. dtype: of the weights; None keeps theirs.
    """
    folder, tokenizer = Path(folder), Path(tokenizer)
    check_folder(folder)
    clip_skip = config["text_encoder"]["params"].get("clip_skip", 1)
    if clip_skip > 1:
        said = "A folder cannot say its clip skip: sample it with --clip_skip %d, clip_skip=%d in diffusers"
        log.warning(said, clip_skip, clip_skip - 1)
    weights = {name: cast_tensors(inner, dtype) for name, inner in _weights(state_dicts, config).items()}
    jsons = _configs(config, tokenizer, size)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        check_space(folder, sum(t.nbytes for inner in weights.values() for t in inner.values()))
        with new_folder(folder) as temporary:
            for name, content in jsons.items():
                (temporary / name).parent.mkdir(exist_ok=True)
                (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            for copied in temporary.glob("tokenizer*"):
                write_vocabulary(tokenizer, copied)
            for name, tensors in weights.items():
                write_tensors(temporary / name, tensors)
    except OSError as error:
        raise UserError(f"The model cannot be written: {error.strerror or error}", where=folder) from error
    return folder


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes `folder` (absent or empty) on leaving without an error."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes it private
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_folder(folder: Path) -> None:
    """Raises UserError unless the folder is absent or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError("The target exists already", where=folder, remedy="Choose a new folder.")


def _weights(state_dicts: StateDicts, config: Mapping[str, Any]) -> dict[str, Mapping[str, Tensor]]:
    """File name -> the tensors of that network under diffusers' names."""
    params = {name: config[name]["params"] for name in ("unet", "vae", "text_encoder")}
    text, rest = params["text_encoder"], dict(state_dicts.get(OPENCLIP_REST, {}))
    weights: dict[str, Mapping[str, Tensor]] = {
        "unet/diffusion_pytorch_model.safetensors": names.rename(
            state_dicts["unet"], names.unet_table(params["unet"])
        ),
        "vae/diffusion_pytorch_model.safetensors": names.rename(
            names.reshape_vae_attention(state_dicts["vae"], dims=2),
            names.autoencoder_table(params["vae"]),
        ),
    }
    text_encoder = state_dicts["text_encoder"]
    if _is_sdxl(config):
        for name, prefix in zip(XL_TEXT, ENCODERS.values(), strict=True):
            weights[f"{name}/model.safetensors"] = _text_model(under(text_encoder, prefix))
        return weights | ({f"{XL_TEXT[1]}/{REST_FILE}": rest} if rest else {})
    if text["layer"] == "penultimate":
        text_encoder, last = without_last_layer(text_encoder, layers=text["num_hidden_layers"])
        rest |= last
    weights["text_encoder/model.safetensors"] = _text_model(text_encoder)
    return weights | ({f"text_encoder/{REST_FILE}": rest} if rest else {})


def _is_sdxl(config: Mapping[str, Any]) -> bool:
    return config["unet"]["params"].get("adm_in_channels") is not None


def _text_model(text_encoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder under transformers' names."""
    tensors = {f"text_model.{n.removeprefix(TEXT_MODEL)}": text_encoder[n] for n in text_encoder}
    projection = tensors.pop(f"text_model.{PROJECTION}", None)
    return tensors if projection is None else tensors | {PROJECTION_WEIGHT: projection.T.contiguous()}


def _configs(config: Mapping[str, Any], tokenizer: Path, size: int) -> dict[str, Any]:
    """Name -> content of each JSON file."""
    unet, vae, text = (config[name]["params"] for name in ("unet", "vae", "text_encoder"))
    vocabulary = read_vocabulary(tokenizer)
    factor, xl = 2 ** (len(vae["ch_mult"]) - 1), _is_sdxl(config)
    jsons = {
        "model_index.json": XL_MODEL_INDEX if xl else MODEL_INDEX,
        "scheduler/scheduler_config.json": configs.schedule_config(config),
        "unet/config.json": configs.unet_config(unet, size=size, factor=factor),
        "vae/config.json": configs.autoencoder_config(vae, size=size),
    }
    encoders = {"": text}
    if xl:
        encoders = {number: text[key]["params"] for number, key in zip(("", "_2"), ENCODERS, strict=True)}
    for number, params in encoders.items():
        tokenizer_to = f"tokenizer{number}"
        jsons |= {
            f"text_encoder{number}/config.json": configs.text_encoder_config(params),
            f"{tokenizer_to}/tokenizer_config.json": configs.tokenizer_config(params, vocabulary),
            f"{tokenizer_to}/special_tokens_map.json": configs.special_tokens(params, vocabulary),
        }
    return jsons
