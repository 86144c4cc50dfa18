"""Opening a model of any format and filling networks with it, tensor by tensor; nothing is loaded in part."""

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

from ldm.checkpoints import folder, geometry, layout
from ldm.checkpoints.shards import INDEX, read_shards, shard_files
from ldm.checkpoints.tensors import read_tensors
from ldm.errors import UserError
from ldm.files import file_sha256

PREDICTION_TYPES = {"epsilon": "eps", "v": "v"}  # of modelspec


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """A model file or folder, opened: tensors are read when they are used.

    parts: see `layout.split`. known: what it says of its networks and schedule, see `geometry.model_config`.
    given_size: pixels a side, if it says. tokenizer: the folder of its vocabulary, if it has one.
    """

    path: Path
    parts: Mapping[str, Mapping[str, Tensor]]
    metadata: Mapping[str, str]
    known: Mapping[str, Any]
    given_size: int | None = None
    tokenizer: Path | None = None

    @cached_property
    def config(self) -> dict[str, Any]:
        """Params of a model section that fit: the networks, the schedule, the parameterization."""
        try:
            return geometry.model_config(self.parts, self.known)
        except UserError as error:
            raise UserError(error.what, where=self.path, remedy=error.remedy) from error

    def require_prediction(self, parameterization: str) -> None:
        """Refuses a config by which the UNet would predict something else than the file says it does."""
        said = self.known.get("parameterization")
        found = said or geometry.guess_parameterization(self.parts)
        if found == parameterization:
            return
        what = f"The UNet predicts {found!r}, but the config says {parameterization!r}"
        if said is None:
            logger.warning("%s: %s", self.path, what)
        else:
            raise UserError(what, where=self.path, remedy=f"Set model.params.parameterization={said}.")

    def size(self, parameterization: str) -> int:
        """Pixels a side that it draws best, if its UNet predicts this."""
        v_prediction = parameterization == "v" and layout.is_sd2(self.parts)
        return self.given_size or (768 if v_prediction else 512)


def open_model(path: str | Path, *, ema: bool = False) -> Model:
    """A Stable Diffusion file, the index of its shards, or a diffusers folder; no tensor is read yet.

    `ema` takes the averaged weights of the UNet, from a file that holds both.
    """
    path = Path(path)
    try:
        model = _open(path, ema=ema)
    except OSError as error:
        what = f"The model cannot be read: {error.strerror or error}"
        raise UserError(what, where=error.filename or path, remedy="See to its permissions.") from error
    what = layout.describe_unet(model.parts["unet"])
    if what is not None:
        conv_in = model.parts["unet"]["input_blocks.0.0.weight"]
        raise UserError(
            f"This is {what}: its UNet takes {conv_in.shape[1]} channels, text to image has 4",
            where=path,
            remedy="Name the model for text to image that it was made from.",
        )
    return model


def _open(path: Path, *, ema: bool) -> Model:
    if folder.is_folder(path):
        if ema:
            raise UserError("A diffusers folder holds no averaged (EMA) weights apart", where=path)
        parts, about = folder.read_folder(path)
        return Model(path, parts, {}, about.known, given_size=about.size, tokenizer=about.tokenizer)
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
            f"This is no Stable Diffusion model file, it looks like {what}", where=path, remedy=remedy
        )
    return (layout.choose_ema(tensors) if ema else tensors), metadata


@contextmanager
def unfilled() -> Iterator[None]:
    """Modules built inside take no memory and draw no weights: `load_parts` is to fill them."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        hook.remove()


def load_parts(
    modules: Mapping[str, nn.Module],
    parts: Mapping[str, Mapping[str, Tensor]],
    *,
    where: object = None,
    device: str | torch.device = "cpu",
) -> None:
    """Copy each part into its module, which keeps its dtype and device. All fit, or nothing is copied.

    What was built `unfilled` is made on `device`, one tensor after the other.
    """
    report = [
        line for name, module in modules.items() for line in _misfits(name, module, parts.get(name, {}))
    ]
    if report:
        what = "The weights do not fit the model:\n  " + "\n  ".join(report) + "\n"
        raise UserError(what, where=where, remedy=_which_config(parts))
    for part, module in modules.items():
        _fill(module, parts[part], device)


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
    """What a single file's metadata says of its networks and schedule, and of its size in pixels."""
    known = json.loads(metadata.get("ldm.config", "{}"))
    prediction = PREDICTION_TYPES.get(metadata.get("modelspec.prediction_type", ""))
    if prediction and "parameterization" not in known:
        known["parameterization"] = prediction
    size = metadata.get("ldm.size") or metadata.get("modelspec.resolution", "").split("x")[0]
    return known, int(size) if size.isdigit() else None


@torch.no_grad()
def _fill(module: nn.Module, part: Mapping[str, Tensor], device: str | torch.device) -> None:
    own = module.state_dict(keep_vars=True)
    for prefix, inner in module.named_modules():
        for leaf, parameter in inner.named_parameters(recurse=False):
            if parameter.is_meta:
                filled = torch.empty_like(parameter, device=device)
                setattr(inner, leaf, nn.Parameter(filled, requires_grad=parameter.requires_grad))
                own[f"{prefix}.{leaf}".removeprefix(".")] = getattr(inner, leaf)
    for name, tensor in own.items():
        tensor.copy_(part[name])


def _misfits(name: str, module: nn.Module, part: Mapping[str, Tensor]) -> list[str]:
    """One line for each kind of misfit between a module and its part of the file."""
    own = module.state_dict()
    if own and not part:
        return [f"{name}: the file holds none of its {len(own)} tensors"]
    shapes = [
        f"{key} {list(part[key].shape)} for {list(own[key].shape)}"
        for key in own
        if key in part and part[key].shape != own[key].shape
    ]
    kinds = {
        "missing": [key for key in own if key not in part],
        "unknown": [key for key in part if key not in own],
        "of another shape": shapes,
    }
    return [f"{name}: {len(keys)} {kind} ({_some(keys)})" for kind, keys in kinds.items() if keys]


def _which_config(parts: Mapping[str, Mapping[str, Tensor]]) -> str:
    released = geometry.released(parts.get("unet", {}))
    if released is None:
        return "Use the config that the file was trained with."
    return f"This looks like {released[0]}: use {released[1]}."


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
