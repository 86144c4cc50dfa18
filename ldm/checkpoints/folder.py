"""Reading of diffusers folders, into Stable Diffusion's own names and our params."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints import diffusers_config as configs
from ldm.checkpoints import diffusers_names as names
from ldm.checkpoints.known import check_known, check_sizes
from ldm.checkpoints.layout import OPENCLIP_REST, renamed
from ldm.checkpoints.openclip import TEXT_MODEL, UNUSED, with_last_layer
from ldm.checkpoints.shards import read_shards
from ldm.checkpoints.tensors import Lazy, read_tensors
from ldm.errors import UserError

FOLDERS = ("unet", "vae", "text_encoder")
REST_FILE = "openclip_rest.safetensors"  # our own, in text_encoder: tensors that diffusers leaves out
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
SHARD = re.compile(r"-\d{5}-of-\d{5}")
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
MOST_CELLS = 1000  # a side of the latents
# What reading a config raises that lacks keys, or has values of other types
UNUSABLE = (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError, RecursionError)


@dataclass(frozen=True)
class About:
    """Content of the JSON configs: config of networks and schedule, image size, folder of the vocabulary."""

    known: Mapping[str, Any]
    size: int | None
    tokenizer: Path | None


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
    unet, vae, text_encoder = (read_json(folder / name / "config.json") for name in FOLDERS)
    tokenizer = folder / "tokenizer" if (folder / "tokenizer" / "vocab.json").is_file() else None
    known = {
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
        "text_encoder": _text_encoder(read_weights(folder / "text_encoder")),
    }
    text = configs.text_encoder_params(text_encoder, tokenizer=tokenizer)
    check_sizes(text, where=folder)
    rest_file = folder / "text_encoder" / REST_FILE
    if unet_params["use_linear_in_transformer"] or rest_file.exists():
        rest = read_tensors(rest_file)[0] if rest_file.exists() else {}
        layers = text["num_hidden_layers"] + 1
        state_dicts["text_encoder"] = with_last_layer(state_dicts["text_encoder"], rest, layers=layers)
        state_dicts[OPENCLIP_REST] = renamed(rest, {name: name for name in UNUSED if name in rest})
        text |= {"num_hidden_layers": layers, "layer": "penultimate"}
    known["text_encoder"] = {"params": text}
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if scheduler.exists():
        known |= configs.schedule_params(read_json(scheduler), where=scheduler)
    check_known(known, where=folder)
    cells = unet.get("sample_size")
    factor = 2 ** (len(vae_params["ch_mult"]) - 1)
    size = cells * factor if isinstance(cells, int) and 0 < cells < MOST_CELLS else None
    return state_dicts, About(known, size, tokenizer)


def read_weights(folder: Path) -> Mapping[str, Tensor]:
    """The tensors in the folder of one network; safetensors and full precision are preferred."""
    found = sorted((rank, path) for path in folder.iterdir() if (rank := _rank(path)) is not None)
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


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"The config cannot be read: {error}", where=path) from error
    if not isinstance(content, dict):
        raise UserError("The config is not a JSON object", where=path)
    return content


def _check(folder: Path) -> None:
    """Raises UserError for a folder of another pipeline, or an incomplete one."""
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").exists() else {}
    kind = index.get("_class_name", PIPELINES[0])
    if kind not in PIPELINES:
        what = f"This is the folder of a {kind}, not of Stable Diffusion 1.x or 2.x"
        raise UserError(what, where=folder)
    if not index and (folder / "config.json").exists():
        kind = read_json(folder / "config.json").get("_class_name", "network")
        what = f"This is the folder of one network ({kind})"
        raise UserError(what, where=folder, remedy="Name the folder that holds unet, vae and text_encoder.")
    missing = [name for name in FOLDERS if not (folder / name / "config.json").is_file()]
    if missing:
        what = f"The diffusers folder is incomplete: {', '.join(missing)} with its config.json is missing"
        raise UserError(what, where=folder, remedy="Download the whole folder.")


def _rank(path: Path) -> tuple[bool, int, str] | None:
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
    own = [n for n in tensors if not n.endswith("position_ids") and n != "text_projection.weight"]
    return renamed(tensors, {TEXT_MODEL + name.removeprefix("text_model."): name for name in own})
