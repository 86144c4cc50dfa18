"""Opening a model of any format, and loading it into networks tensor by tensor, all or nothing."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ldm.checkpoints import folder, infer_config, layout
from ldm.checkpoints.shards import INDEX, read_shards, shard_files
from ldm.checkpoints.tensors import read_tensors
from ldm.errors import UserError
from ldm.files import file_sha256

PREDICTION_TYPES = {"epsilon": "eps", "v": "v"}  # of modelspec


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """An open model file or folder; its tensors are read when they are used.

    state_dicts: see `layout.split`. known: what it says of its networks and schedule, see
    `infer_config.model_config`.
    given_size: image size in pixels, if it says. tokenizer: folder of its vocabulary, if it has one.
    """

    path: Path
    state_dicts: Mapping[str, Mapping[str, Tensor]]
    metadata: Mapping[str, str]
    known: Mapping[str, Any]
    given_size: int | None = None
    tokenizer: Path | None = None

    @cached_property
    def config(self) -> dict[str, Any]:
        """The params of a model section for this model: networks, schedule, parameterization."""
        try:
            return infer_config.model_config(self.state_dicts, self.known)
        except UserError as error:
            raise UserError(error.what, where=self.path, remedy=error.remedy) from error

    def require_prediction(self, parameterization: str) -> None:
        """Raises UserError if the file names another prediction type; warns if its weights suggest it."""
        said = self.known.get("parameterization")
        found = said or infer_config.infer_prediction_type(self.state_dicts)
        if found == parameterization:
            return
        what = f"The UNet predicts {found!r}, but the config says {parameterization!r}"
        if said is None:
            logger.warning("%s: %s", self.path, what)
        else:
            raise UserError(what, where=self.path, remedy=f"Set model.params.parameterization={said}.")

    def size(self, parameterization: str) -> int:
        """Native image size in pixels, given the prediction type of the UNet."""
        v_prediction = parameterization == "v" and layout.is_sd2(self.state_dicts)
        return self.given_size or (768 if v_prediction else 512)


def open_model(path: str | Path, *, ema: bool = False) -> Model:
    """Opens a Stable Diffusion file, the index of its shards, or a diffusers folder; reads no tensor.

    ema: take the EMA weights of the UNet, from a file that holds both. Raises UserError for anything else
    than a text-to-image model of Stable Diffusion 1.x or 2.x.
    """
    path = Path(path)
    try:
        model = _open(path, ema=ema)
    except OSError as error:
        what = f"The model cannot be read: {error.strerror or error}"
        raise UserError(what, where=error.filename or path, remedy="Check its permissions.") from error
    what = layout.describe_unet(model.state_dicts["unet"])
    if what is not None:
        conv_in = model.state_dicts["unet"]["input_blocks.0.0.weight"]
        raise UserError(
            f"This is {what}: its UNet takes {conv_in.shape[1]} channels, text to image has 4",
            where=path,
            remedy="Use the text-to-image model that it was made from.",
        )
    return model


def _open(path: Path, *, ema: bool) -> Model:
    if folder.is_folder(path):
        if ema:
            raise UserError("A diffusers folder has no separate EMA weights", where=path)
        state_dicts, about = folder.read_folder(path)
        return Model(path, state_dicts, {}, about.known, given_size=about.size, tokenizer=about.tokenizer)
    tensors, metadata = read_checkpoint(path, ema=ema)
    known, size = _about(metadata)
    return Model(path, layout.split(tensors), metadata, known, given_size=size)


def read_checkpoint(path: str | Path, *, ema: bool = False) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """Tensors of a Stable Diffusion file under its own names (see `layout.split`), and its text metadata."""
    path = Path(path)
    tensors, metadata = read_shards(path) if path.name.endswith(INDEX) else read_tensors(path)
    what = layout.describe(tensors)
    if what is not None:
        remedy = f"Names should begin with {', '.join(layout.PREFIXES.values())}; here is {min(tensors)}."
        raise UserError(
            f"This is not a Stable Diffusion model file, it looks like {what}", where=path, remedy=remedy
        )
    return (layout.choose_ema(tensors) if ema else tensors), metadata


@contextmanager
def init_on_meta() -> Iterator[None]:
    """Builds modules on the meta device: they take no memory until `load_state_dicts` fills them."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        hook.remove()


def load_state_dicts(
    modules: Mapping[str, nn.Module],
    state_dicts: Mapping[str, Mapping[str, Tensor]],
    *,
    where: object = None,
    device: str | torch.device = "cpu",
) -> None:
    """Copies each state dict into its module, which keeps its dtype and device.

    Modules built under `init_on_meta` are created on `device`, one tensor after the other. Raises UserError,
    before anything is copied, if names or shapes differ.
    """
    report = [
        line for name, module in modules.items() for line in _misfits(name, module, state_dicts.get(name, {}))
    ]
    if report:
        what = "The weights do not fit the model:\n  " + "\n  ".join(report) + "\n"
        raise UserError(what, where=where, remedy=_which_config(state_dicts))
    for name, module in modules.items():
        _fill(module, state_dicts[name], device)


def file_hash(path: str | Path) -> str:
    """sha256 of a file's bytes, in hex; of a folder or an index, that of its files' names and hashes."""
    path = Path(path)
    if path.is_dir() or path.name.endswith(INDEX):
        folder, files = path, sorted(path.rglob("*"))
        if path.is_file():
            folder, files = path.parent, [path, *sorted(set(shard_files(path).values()))]
        files = [p for p in files if p.suffix in (".safetensors", ".bin", ".json")]
        lines = [f"{file_sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    return file_sha256(path)


def _about(metadata: Mapping[str, str]) -> tuple[dict[str, Any], int | None]:
    """Metadata of a single file -> (config of its networks and schedule, image size in pixels)."""
    known = json.loads(metadata.get("ldm.config", "{}"))
    prediction = PREDICTION_TYPES.get(metadata.get("modelspec.prediction_type", ""))
    if prediction and "parameterization" not in known:
        known["parameterization"] = prediction
    size = metadata.get("ldm.size") or metadata.get("modelspec.resolution", "").split("x")[0]
    return known, int(size) if size.isdigit() else None


@torch.no_grad()
def _fill(module: nn.Module, state_dict: Mapping[str, Tensor], device: str | torch.device) -> None:
    own = module.state_dict(keep_vars=True)
    for prefix, inner in module.named_modules():
        for leaf, parameter in inner.named_parameters(recurse=False):
            if parameter.is_meta:
                filled = torch.empty_like(parameter, device=device)
                setattr(inner, leaf, nn.Parameter(filled, requires_grad=parameter.requires_grad))
                own[f"{prefix}.{leaf}".removeprefix(".")] = getattr(inner, leaf)
    for name, tensor in own.items():
        tensor.copy_(state_dict[name])


def _misfits(name: str, module: nn.Module, state_dict: Mapping[str, Tensor]) -> list[str]:
    """One line for each kind of difference between a module and its state dict."""
    own = module.state_dict()
    if own and not state_dict:
        return [f"{name}: the file holds none of its {len(own)} tensors"]
    shapes = [
        f"{key} {list(state_dict[key].shape)} for {list(own[key].shape)}"
        for key in own
        if key in state_dict and state_dict[key].shape != own[key].shape
    ]
    kinds = {
        "missing": [key for key in own if key not in state_dict],
        "unknown": [key for key in state_dict if key not in own],
        "of another shape": shapes,
    }
    return [f"{name}: {len(keys)} {kind} ({_some(keys)})" for kind, keys in kinds.items() if keys]


def _which_config(state_dicts: Mapping[str, Mapping[str, Tensor]]) -> str:
    family = infer_config.known_family(state_dicts.get("unet", {}))
    if family is None:
        return "Use the config that the file was trained with."
    return f"This looks like {family[0]}: use {family[1]}."


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
