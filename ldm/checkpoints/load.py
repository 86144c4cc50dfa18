"""Opening a model of any format, and loading it into networks tensor by tensor, all or nothing."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ldm.checkpoints import folder, infer_config, layout, run_checkpoint
from ldm.checkpoints.embedding import Embeddings
from ldm.checkpoints.hub import local_path
from ldm.checkpoints.known import check_known, read_known
from ldm.checkpoints.lora import merge_lora
from ldm.checkpoints.shards import INDEX, read_shards, shard_files
from ldm.checkpoints.tensors import read_tensors
from ldm.checkpoints.vae import check_same_scale, open_vae
from ldm.errors import UserError
from ldm.families.family import Family
from ldm.families.known import family_of, released_family
from ldm.families.sdxl import layout as sdxl
from ldm.families.sdxl.family import SDXL
from ldm.files import file_sha256

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """An open model file or folder; its tensors are read when they are used.

    state_dicts: see `layout.split`. known: what it says of its networks and schedule, see
    `infer_config.model_config`.
    given_size: image size in pixels, if it says. tokenizer: folder of its vocabulary, if it has one.
    learned_tokens: word -> embeddings [n, D], in a run's checkpoint. prediction: the prediction type that it
    states itself, also where a config is given in place of what it says. distilled: what in a folder tells of
    a model for few steps.
    """

    path: Path
    state_dicts: Mapping[str, Mapping[str, Tensor]]
    metadata: Mapping[str, str]
    known: Mapping[str, Any]
    given_size: int | None = None
    tokenizer: Path | None = None
    learned_tokens: Mapping[str, Embeddings] = field(default_factory=dict)
    prediction: str | None = None
    distilled: str | None = None

    @cached_property
    def config(self) -> dict[str, Any]:
        """The params of a model section for this model: networks, schedule, parameterization."""
        try:
            return infer_config.model_config(self.state_dicts, self.known)
        except UserError as error:
            raise UserError(error.what, where=self.path, remedy=error.remedy) from error

    def require_prediction(self, parameterization: str) -> None:
        """Raises UserError if the file names another prediction type; warns if its weights suggest it."""
        said = self.prediction
        found = said or infer_config.infer_prediction_type(self.state_dicts)
        if found == parameterization:
            return
        what = f"The UNet predicts {found!r}, but the config says {parameterization!r}"
        if said is None:
            logger.warning("%s: %s", self.path, what)
        else:
            raise UserError(
                what, where=self.path, remedy=f"Set model.params.process.parameterization={said}."
            )

    def size(self, parameterization: str) -> int:
        """Native image size in pixels, given the prediction type of the UNet."""
        return self.given_size or self.family.sizes[parameterization]

    @cached_property
    def family(self) -> Family:
        """That of its networks."""
        return family_of(self.state_dicts)


def open_model(
    path: str | Path,
    *,
    ema: bool = False,
    vae: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
) -> Model:
    """Opens a Stable Diffusion file, the index of its shards, or a diffusers folder; reads no tensor.

    What a hub id names is downloaded first, unless it is here, see `ldm.checkpoints.hub`.

    ema: take the EMA weights of the UNet, from a file that holds both. vae: a VAE in place of its own, see
    `open_vae`. config: stands for what the file says; with a `model` section, or the params of one.
    In a run's checkpoint, its LoRA is merged. Raises UserError for anything else than a text-to-image model
    of Stable Diffusion 1.x, 2.x or XL.
    """
    path = local_path(path)
    vae = None if vae is None else local_path(vae)
    try:
        model = _open(path, config, ema=ema)
        model = model if vae is None else _with_vae(model, vae)
    except OSError as error:
        what = f"The model cannot be read: {error.strerror or error}"
        raise UserError(what, where=error.filename or path, remedy="Check its permissions.") from error
    except UserError as error:
        raise UserError(error.what, where=error.where or path, remedy=error.remedy) from error
    what = layout.describe_unet(model.state_dicts["unet"])
    if what is not None:
        conv_in = model.state_dicts["unet"]["input_blocks.0.0.weight"]
        raise UserError(
            f"This is {what}: its UNet takes {conv_in.shape[1]} channels, text to image has 4",
            where=path,
            remedy="Use the text-to-image model that it was made from.",
        )
    if model.family is SDXL:
        _check_sdxl(model)
    return model


def _check_sdxl(model: Model) -> None:
    """Refuses SDXL without one of its text encoders; warns of a model that was distilled to few steps."""
    lacking = sdxl.missing_encoder(model.state_dicts)
    if lacking is not None:
        what = f"This is a Stable Diffusion XL model, and it lacks {lacking}"
        raise UserError(what, where=model.path, remedy="Use a whole file, or a diffusers folder with both.")
    said = [model.metadata.get(f"modelspec.{key}", "") for key in ("architecture", "title")]
    words = [sdxl.distilled_word(text) for text in (*said, model.path.name)]
    word = next((word for word in words if word is not None), None) or model.distilled
    if word is not None:
        logger.warning(
            "%s seems to be distilled (%s): it needs few steps and guidance_scale 1, and training on it "
            "loses that. Train the base that it was made from",
            model.path,
            word,
        )


def _open(path: Path, config: Mapping[str, Any] | None, *, ema: bool) -> Model:
    if folder.is_folder(path):
        if ema:
            raise UserError("A diffusers folder has no separate EMA weights", where=path)
        state_dicts, about = folder.read_folder(path)
        return Model(
            path,
            state_dicts,
            {},
            about.known if config is None else run_checkpoint.model_params(config),
            given_size=run_checkpoint.image_size(config or {}) or about.size,
            tokenizer=about.tokenizer,
            prediction=about.known.get("parameterization"),
            distilled=about.distilled,
        )
    own_config = run_checkpoint.run_config(path)
    tensors, metadata = read_checkpoint(path, ema=ema)
    config = own_config if config is None else config
    known, size = read_known(metadata, where=path)
    known = sdxl.marked(tensors) | known | run_checkpoint.model_params(own_config)
    params = run_checkpoint.model_params(config)
    check_known(params, where=path)
    state_dicts = layout.split(tensors)
    layers = run_checkpoint.lora_layers(tensors, state_dicts, params, where=path)
    return Model(
        path,
        merge_lora(state_dicts, layers) if layers else state_dicts,
        metadata,
        params or known,
        given_size=run_checkpoint.image_size(config) or size,
        tokenizer=run_checkpoint.tokenizer_of_run(path, own_config),
        learned_tokens=run_checkpoint.learned_tokens(tensors),
        prediction=known.get("parameterization"),
    )


def _with_vae(model: Model, path: Path) -> Model:
    tensors, node = open_vae(path)
    own = model.known.get("vae") or {"params": model.family.networks["vae"].defaults}
    check_same_scale(node, own, where=path)
    known = model.known if node is None else {**model.known, "vae": node}
    return replace(model, state_dicts={**model.state_dicts, "vae": tensors}, known=known)


def read_checkpoint(path: str | Path, *, ema: bool = False) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """Tensors of a Stable Diffusion file under its own names (see `layout.split`), and its text metadata."""
    path = Path(path)
    tensors, metadata = read_shards(path) if path.name.endswith(INDEX) else read_tensors(path)
    tensors = layout.with_ema_alone(tensors)
    what = layout.describe(tensors)
    if what is not None:
        remedy = f"Names should begin with {', '.join(layout.PREFIXES.values())}; here is {min(tensors)}."
        raise UserError(
            f"This is not a Stable Diffusion model file, it looks like {what}", where=path, remedy=remedy
        )
    try:
        layout.check_not_quantized(tensors)
        return (layout.choose_ema(tensors) if ema else tensors), metadata
    except UserError as error:
        raise UserError(error.what, where=path, remedy=error.remedy) from error


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
    before anything is copied, if they do not fit (`check_fit`).
    """
    check_fit(modules, state_dicts, where=where)
    for name, module in modules.items():
        _fill(module, state_dicts[name], device)


def check_fit(
    modules: Mapping[str, nn.Module],
    state_dicts: Mapping[str, Mapping[str, Tensor]],
    *,
    where: object = None,
) -> None:
    """Raises UserError if names, shapes or kinds of numbers differ; modules may be on the meta device."""
    report = [
        line for name, module in modules.items() for line in _misfits(name, module, state_dicts.get(name, {}))
    ]
    if report:
        what = "The weights do not fit the model:\n  " + "\n  ".join(report) + "\n"
        remedy = _which_config(state_dicts)
        if all(line.startswith("vae: the file holds none") for line in report):
            remedy = "A VAE of the family completes it: --vae FILE, or base_parts.vae=FILE in a config."
        raise UserError(what, where=where, remedy=remedy)


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
    held = {key: (tensor.shape, tensor.dtype) for key in own if (tensor := state_dict.get(key)) is not None}
    kinds = {
        "missing": [key for key in own if key not in held],
        "unknown": [key for key in state_dict if key not in own],
        "of another shape": [
            f"{key} {list(shape)} for {list(own[key].shape)}"
            for key, (shape, _) in held.items()
            if shape != own[key].shape
        ],
        "not of floating-point numbers": [
            f"{key} {dtype}"
            for key, (_, dtype) in held.items()
            if own[key].is_floating_point() and not dtype.is_floating_point
        ],
    }
    return [f"{name}: {len(keys)} {kind} ({_some(keys)})" for kind, keys in kinds.items() if keys]


def _which_config(state_dicts: Mapping[str, Mapping[str, Tensor]]) -> str:
    family = released_family(state_dicts.get("unet", {}))
    if family is None:
        return "Use the config that the file was trained with."
    return f"This looks like {family.name}: use {family.config}."


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
