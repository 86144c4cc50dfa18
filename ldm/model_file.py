"""The networks of a model file or folder: built on the meta device, checked, then filled with weights."""

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoints.embedding import Embeddings, embeddings_beside, read_embedding
from ldm.checkpoints.hub import local_path
from ldm.checkpoints.infer_config import SCHEDULE
from ldm.checkpoints.layout import PREFIXES
from ldm.checkpoints.load import Model, check_fit, file_hash, init_on_meta, load_state_dicts, open_model
from ldm.checkpoints.lora import merge_lora, read_lora
from ldm.checkpoints.lora_ranks import check_ranks, read_ranks
from ldm.checkpoints.run_checkpoint import model_params
from ldm.config import instantiate
from ldm.denoiser import Denoiser
from ldm.diffusion.process import DiscreteDiffusion, NoiseProcess
from ldm.diffusion.schedule import make_alphas_cumprod
from ldm.errors import UserError
from ldm.families.sdxl.family import SDXL, vae_dtype
from ldm.models.lora import LoRA


class ModelFile:
    """A Stable Diffusion file, a folder as diffusers saves it or a hub id, and its networks in eval mode.

    config: with a `model` section, or the params of one; None takes what its metadata or layout says.
    names: the networks that are wanted, of {"unet", "vae", "text_encoder"}. vae: a file or folder of the VAE
    in place of its own. Raises UserError, before memory is taken, if tensors and config do not fit.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        config: Mapping[str, Any] | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        names: Collection[str] = tuple(PREFIXES),
        vae: str | Path | None = None,
    ):
        use_device(device)
        self.path = local_path(path)
        self.device = device
        self.model = open_model(self.path, vae=vae, config=config)
        params = self.model.config if config is None else _model_params(config, where=path)
        check_model(self.model, params, names=names)
        schedule = {key: params[key] for key in SCHEDULE if key in params}
        self.process: NoiseProcess = DiscreteDiffusion(
            make_alphas_cumprod(**schedule, dtype=torch.float64),
            parameterization=params.get("parameterization", "eps"),
        )
        with init_on_meta():
            self.networks = {name: instantiate(params[name]).to(dtype) for name in names}
        if "vae" in self.networks:
            self.networks["vae"].to(vae_dtype(dtype, is_sdxl=self.model.family is SDXL))
        if self.model.tokenizer is not None and config is None:
            self.networks["text_encoder"].tokenizer_name = str(self.model.tokenizer)

    @cached_property
    def hash(self) -> str:
        """sha256 of the file or folder."""
        return file_hash(self.path)

    def fill(self, *, loras: Sequence[tuple[Path, float]] = (), embeddings: Sequence[Path] = ()) -> None:
        """Reads the weights; each LoRA file is merged into them at its weight, a T-LoRA put beside them.

        embeddings: textual-inversion files, whose tokens prompts may contain; a run's own is read too.
        """
        state_dicts, by_timestep = self.model.state_dicts, []
        for file, weight in loras:
            if read_ranks(file) is not None:
                by_timestep.append((file, weight))
                continue
            state_dicts = merge_lora(state_dicts, read_lora(file, state_dicts), weight=weight)
        load_state_dicts(self.networks, state_dicts, where=self.path, device=self.device)
        tokens = [(self.path, word, vectors) for word, vectors in self.model.learned_tokens.items()]
        for file in [*_own_embeddings(self.path), *embeddings]:
            tokens += [(file, word, vectors) for word, vectors in read_embedding(file).items()]
        for file, word, vectors in tokens:
            self._add_token(word, vectors, where=file)
        for network in self.networks.values():
            network.eval().to(self.device).requires_grad_(False)
        self.attach(by_timestep)

    def _add_token(self, word: str, vectors: Embeddings, *, where: Path) -> None:
        try:
            self.networks["text_encoder"].add_token(word, vectors, new=False)
        except UserError as error:
            raise UserError(error.what, where=where, remedy=error.remedy) from error

    def attach(self, loras: Sequence[tuple[Path, float]]) -> list[LoRA]:
        """Attaches LoRA files to the filled networks at their weights: not merged, they can be off."""
        attached = []
        for file, weight in loras:
            layers, ranks = read_lora(file, self.model.state_dicts), read_ranks(file)
            if ranks is not None:
                check_ranks(layers, ranks, where=file)
            attached.append(LoRA.of_file(self.networks, layers, weight=weight, ranks=ranks))
        return attached

    def denoiser(self, *, model_hash: str | None = None, without: Sequence[LoRA] = ()) -> Denoiser:
        """UNet and text encoder of the file, filled or not yet."""
        return Denoiser(
            self.networks["unet"],
            self.networks["text_encoder"],
            process=self.process,
            model_hash=model_hash,
            without=without,
            graphed=True,
        )


def check_model(model: Model, params: Mapping[str, Any], *, names: Collection[str] = tuple(PREFIXES)) -> None:
    """Raises UserError if the tensors do not fit the networks of `params`; these are built without memory."""
    try:
        with torch.device("meta"):
            networks = {name: instantiate(params[name]) for name in names}
        _check_heads(params["unet"].get("params") or {}, where=model.path)
    except UserError:
        raise
    except Exception as error:  # numbers that no network has: of many kinds, by the libraries' constructors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"No network has these params: {reason}", where=model.path) from error
    check_fit(networks, model.state_dicts, where=model.path)


def _check_heads(unet: Mapping[str, Any], *, where: object) -> None:
    """Raises UserError where heads of equal width do not make up a level's channels."""
    for mult in unet.get("channel_mult", (1, 2, 4, 4)):
        width, head_width = unet.get("model_channels", 320) * mult, unet.get("num_head_channels")
        heads = width // head_width if head_width else unet.get("num_heads", 8)
        if heads < 1 or width % heads:
            raise UserError(f"{width} channels cannot be divided into {heads} heads", where=where)


def _own_embeddings(path: Path) -> list[Path]:
    """The learned tokens of a run, in files beside its model."""
    return sorted(embeddings_beside(path).glob("*.safetensors")) if path.name == "model.safetensors" else []


def _model_params(config: Mapping[str, Any], *, where: object) -> Mapping[str, Any]:
    """Params of a config's model section, which must describe the networks."""
    params = model_params(config)
    missing = [name for name in PREFIXES if name not in params]
    if missing:
        raise UserError(f"The model section of the config lacks {', '.join(missing)}", where=where)
    return params


def use_device(device: str | torch.device) -> None:
    """Makes a GPU that has a number the process's own: kernels that are told no device run there.

    Raises UserError for a device that is not here.
    """
    try:
        place = torch.empty(0, device=device).device
        if place.type == "cuda":
            torch.cuda.set_device(place)
    except (RuntimeError, AssertionError) as error:  # unknown, not compiled in, or absent
        reason = str(error).splitlines()[0]
        raise UserError(f"The device {device} cannot be used: {reason}", remedy="Try cpu.") from error
