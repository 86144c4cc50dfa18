"""Reading of diffusers folders, into Stable Diffusion's own names and our params."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints import diffusers_config as configs
from ldm.checkpoints import diffusers_names as names
from ldm.checkpoints.known import check_known, check_sizes
from ldm.checkpoints.layout import OPENCLIP_REST
from ldm.checkpoints.shards import read_shards
from ldm.checkpoints.tensors import read_tensors
from ldm.errors import UserError
from ldm.families.sd.family import CLIP, OPENCLIP
from ldm.families.sd.openclip import PROJECTION, UNUSED, with_last_layer
from ldm.families.sdxl.family import ENCODER_DEFAULTS, ENCODERS
from ldm.families.shapes import TEXT_MODEL
from ldm.lazy import Lazy, renamed
from ldm.models.vocabulary_files import has_vocabulary

FOLDERS = ("unet", "vae", "text_encoder")
REST_FILE = "openclip_rest.safetensors"  # our own, with a text encoder: tensors that diffusers leaves out
PROJECTION_WEIGHT = f"{PROJECTION}.weight"  # of a linear layer [P, D]; OpenCLIP has the transpose
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
SHARD = re.compile(r"-\d{5}-of-\d{5}")
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
XL_PIPELINES = tuple(name.replace("Diffusion", "DiffusionXL") for name in PIPELINES)
XL_TEXT = ("text_encoder", "text_encoder_2")  # folders of SDXL's two
MOST_CELLS = 1000  # a side of the latents
# What reading a config raises that lacks keys, or has values of other types
UNUSABLE = (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError, RecursionError)


@dataclass(frozen=True)
class About:
    """Content of the JSON configs: config of networks and schedule, image size, folder of the vocabulary."""

    known: Mapping[str, Any]
    size: int | None
    tokenizer: Path | None
    distilled: str | None = None  # what tells of a model for few steps


def is_folder(path: Path) -> bool:
    """Whether a path is a diffusers folder, of a pipeline or of one network."""
    signs = ("model_index.json", "unet", "config.json")
    return path.is_dir() and any((path / sign).exists() for sign in signs)


def read_folder(folder: Path) -> tuple[dict[str, Mapping[str, Tensor]], About]:
    """The state dicts of the three networks (see `layout.split`), and what the JSON configs say."""
    _check(folder)
    with config_of(folder):
        return _read(folder)


def _read(folder: Path) -> tuple[dict[str, Mapping[str, Tensor]], About]:
    unet, vae = (configs.read_json(folder / name / "config.json") for name in ("unet", "vae"))
    known: dict[str, Any] = {
        "unet": {"params": configs.unet_params(unet, where=folder / "unet")},
        "vae": {"params": configs.autoencoder_params(vae, where=folder / "vae")},
    }
    unet_params, vae_params = known["unet"]["params"], known["vae"]["params"]
    for params in (unet_params, vae_params):
        check_sizes(params, where=folder)
    vae_tensors = names.rename(read_weights(folder / "vae"), names.autoencoder_reading_table(vae_params))
    state_dicts: dict[str, Mapping[str, Tensor]] = {
        "unet": names.rename(read_weights(folder / "unet"), names.inverse(names.unet_table(unet_params))),
        "vae": names.reshape_vae_attention(vae_tensors, dims=4),
    }
    if "adm_in_channels" in unet_params:
        text, state_dicts["text_encoder"], rest = _sdxl_text_encoders(folder)
    else:
        text, state_dicts["text_encoder"], rest = _sd_text_encoder(folder, unet_params)
    if rest is not None:
        state_dicts[OPENCLIP_REST] = renamed(rest, {name: name for name in UNUSED if name in rest})
    known["text_encoder"] = {"params": text}
    scheduler, distilled = folder / "scheduler" / "scheduler_config.json", None
    if scheduler.exists():
        schedule = configs.read_json(scheduler)
        known |= configs.schedule_params(schedule, where=scheduler)
        distilled = configs.distilled_scheduler(schedule)
    check_known(known, where=folder)
    cells = unet.get("sample_size")
    factor = 2 ** (len(vae_params["ch_mult"]) - 1)
    size = cells * factor if isinstance(cells, int) and 0 < cells < MOST_CELLS else None
    return state_dicts, About(known, size, tokenizer_in(folder), distilled)


TextEncoder = tuple[
    dict[str, Any], Mapping[str, Tensor], Mapping[str, Tensor] | None
]  # params, tensors, rest


def _sd_text_encoder(folder: Path, unet_params: Mapping[str, Any]) -> TextEncoder:
    """SD 1.x's or 2.x's; in 2.x the folder lacks the last layer, unless this repo wrote the folder."""
    own = folder / "text_encoder"
    config, rest = configs.read_json(own / "config.json"), _rest(own)
    is_first = rest is None and not unet_params["use_linear_in_transformer"]
    pad = (CLIP if is_first else OPENCLIP)["pad_token_id"]
    text = configs.text_encoder_params(config, tokenizer=tokenizer_in(folder), pad=pad)
    check_sizes(text, where=folder)
    tensors = _text_encoder(read_weights(own))
    if is_first:
        return text, tensors, None
    layers = text["num_hidden_layers"] + 1
    tensors = with_last_layer(tensors, rest or {}, layers=layers)
    return text | {"num_hidden_layers": layers, "layer": "penultimate"}, tensors, rest or {}


def _sdxl_text_encoders(folder: Path) -> TextEncoder:
    """Both of SDXL, under the names of `SDXLTextEncoders`."""
    first, second = (read_weights(folder / name) for name in XL_TEXT)
    if PROJECTION_WEIGHT not in second:
        what = (
            "The text encoders are swapped"
            if PROJECTION_WEIGHT in first
            else "text_encoder_2 has no projection"
        )
        raise UserError(what, where=folder, remedy="text_encoder is CLIP-L, text_encoder_2 OpenCLIP bigG.")
    params, tensors = {}, {}
    for (key, prefix), name, number in zip(ENCODERS.items(), XL_TEXT, ("", "_2"), strict=True):
        tokenizer = tokenizer_in(folder, number) or tokenizer_in(folder)
        config, pad = configs.read_json(folder / name / "config.json"), ENCODER_DEFAULTS[key]["pad_token_id"]
        own = configs.text_encoder_params(config, tokenizer=tokenizer, pad=pad)
        check_sizes(own, where=folder / name)
        if tokenizer_in(folder) is not None:  # the second has "!" as a token apart, for its padding
            own["tokenizer"] = str(tokenizer_in(folder))
        params[key] = {"params": own | {"layer": "penultimate_hidden"}}
        held = _text_encoder(second if number else first)
        tensors |= {prefix + n: partial(held.__getitem__, n) for n in held}
    tensors[ENCODERS["clip_g"] + PROJECTION] = lambda: second[PROJECTION_WEIGHT].T.contiguous()
    return params, Lazy(tensors), _rest(folder / XL_TEXT[1]) or {}


def tokenizer_in(folder: Path, number: str = "") -> Path | None:
    """The tokenizer's folder in a model's. number: "_2" for SDXL's second."""
    path = folder / f"tokenizer{number}"
    return path if has_vocabulary(path) else None


def _rest(folder: Path) -> Mapping[str, Tensor] | None:
    path = folder / REST_FILE
    return read_tensors(path)[0] if path.exists() else None


def read_weights(folder: Path) -> Mapping[str, Tensor]:
    """The tensors in the folder of one network; safetensors and full precision are preferred."""
    found = sorted((rank, path) for path in folder.iterdir() if (rank := weights_rank(path)) is not None)
    if not found:
        remedy = "Download the whole folder; it should hold a .safetensors or .bin file."
        raise UserError("The folder holds no weights", where=folder, remedy=remedy)
    path = found[0][1]
    if path.suffix != ".json":
        return read_tensors(path)[0]
    return read_shards(path)[0]


@contextmanager
def config_of(folder: Path) -> Iterator[None]:
    """Raises UserError for a JSON config that lacks a key, or has one of another type, inside `with`."""
    try:
        yield
    except UNUSABLE as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"The config describes no network: {reason}", where=folder) from error


def _check(folder: Path) -> None:
    """Raises UserError for a folder of another pipeline, or an incomplete one."""
    index = configs.read_json(folder / "model_index.json") if (folder / "model_index.json").exists() else {}
    kind = index.get("_class_name", PIPELINES[0])
    if kind not in PIPELINES + XL_PIPELINES:
        what = f"This is the folder of a {kind}, not of Stable Diffusion 1.x, 2.x or XL"
        raise UserError(what, where=folder)
    xl = kind in XL_PIPELINES
    if xl and (index.get("requires_aesthetics_score") or index.get("text_encoder") == [None, None]):
        remedy = "Use the folder of the base model."
        raise UserError(
            "This is the folder of the refiner of Stable Diffusion XL", where=folder, remedy=remedy
        )
    if not index and (folder / "config.json").exists():
        kind = configs.read_json(folder / "config.json").get("_class_name", "network")
        what = f"This is the folder of one network ({kind})"
        raise UserError(what, where=folder, remedy="Name the folder that holds unet, vae and text_encoder.")
    wanted = FOLDERS + XL_TEXT[1:] if xl else FOLDERS
    missing = [name for name in wanted if not (folder / name / "config.json").is_file()]
    if missing:
        what = f"The diffusers folder is incomplete: {', '.join(missing)} with its config.json is missing"
        raise UserError(what, where=folder, remedy="Download the whole folder.")


def weights_rank(path: Path) -> tuple[bool, int, str] | None:
    """Sort key of a weights file, the best choice first; None if it does not hold a whole network.

    Names are STEM[.VARIANT].safetensors or .bin, and an index STEM.SUFFIX.index[.VARIANT].json of shards.
    """
    stem, *words = path.name.split(".")
    index = words[-1:] == ["json"] and "index" in words
    pickled, safe = "bin" in words, "safetensors" in words
    if stem not in STEMS or pickled == safe or (words[-1] not in ("bin", "safetensors") and not index):
        return None
    if any(SHARD.search(word) for word in (stem, *words)):
        return None
    variant = [word for word in words if word not in ("bin", "safetensors", "index", "json")]
    return pickled, 0 if not variant else 1 if variant == ["fp16"] else 2, path.name


def _text_encoder(tensors: Mapping[str, Tensor]) -> Lazy:
    """transformers' names, which up to version 4 begin with `text_model.`, -> those of `CLIPTextEncoder`."""
    own = [n for n in tensors if not n.endswith("position_ids") and n != PROJECTION_WEIGHT]
    return renamed(tensors, {TEXT_MODEL + name.removeprefix("text_model."): name for name in own})
