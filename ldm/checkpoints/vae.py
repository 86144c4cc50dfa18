"""A VAE by itself, as people swap them: a file in LDM's or diffusers' names, a folder, or that of a model."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints import diffusers_names as names
from ldm.checkpoints import folder
from ldm.checkpoints.diffusers_config import autoencoder_params, read_json
from ldm.checkpoints.known import check_known, check_sizes, read_known
from ldm.checkpoints.layout import LATENT_CHANNELS, NOT_WEIGHTS, PREFIXES
from ldm.checkpoints.shards import INDEX, read_shards
from ldm.checkpoints.tensors import read_tensors
from ldm.errors import UserError
from ldm.families.known import family_of
from ldm.families.sd.family import SCALE
from ldm.families.shapes import count_names
from ldm.lazy import renamed, under

log = logging.getLogger(__name__)
OUTER = (PREFIXES["vae"], "vae.")  # before the names, in files of whole models or of some tools
HALVES = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
LDM_SIGN, DIFFUSERS_SIGN = "decoder.up.", "decoder.up_blocks."


def open_vae(path: str | Path) -> tuple[Mapping[str, Tensor], dict[str, Any] | None]:
    """The VAE's tensors under SD's names, read lazily, and its node, if the file or folder states one.

    path: a VAE alone, or a model or a diffusers folder that has one. Raises UserError where there is none.
    """
    path = Path(path)
    if folder.is_folder(path):
        inner = path if (path / "config.json").exists() else path / "vae"
        with folder.config_of(inner):
            params = autoencoder_params(read_json(inner / "config.json"), where=inner)
            check_sizes(params, where=inner)
            check_known({"vae": {"params": params}}, where=inner)
        tensors, node = _own_names(folder.read_weights(inner), params), {"params": params}
    else:
        held, metadata = read_shards(path) if path.name.endswith(INDEX) else read_tensors(path)
        prefix = next((p for p in OUTER if any(name.startswith(p) for name in held)), "")
        table = {
            own: name
            for name in held
            if name.startswith(prefix)
            and (own := name.removeprefix(prefix)).startswith(HALVES)
            and not own.startswith(NOT_WEIGHTS)
        }
        tensors = renamed(held, table)
        node = read_known(metadata, where=path)[0].get("vae") or _node_of_family(held)
        if any(name.startswith(DIFFUSERS_SIGN) for name in tensors):
            tensors = _own_names(tensors, _levels(tensors))
    _check(tensors, path)
    return tensors, node


def check_same_scale(node: Mapping[str, Any] | None, own: Mapping[str, Any] | None, *, where: object) -> None:
    """Raises UserError for a VAE that states another scale of its latents than the model's own node `own`.

    Warns of one that states none, where the model's is not Stable Diffusion's: names and shapes are the same.
    """
    usual = SCALE["scale_factor"]
    theirs, ours = (((n or {}).get("params") or {}).get("scale_factor", usual) for n in (node, own))
    if node is not None and theirs != ours:
        what = f"This VAE scales its latents by {theirs}, the model's by {ours}"
        raise UserError(what, where=where, remedy="Use a VAE of the model's own family.")
    if node is None and ours != usual:
        log.warning("%s does not state its scale: it is taken for a VAE of this family, of %s", where, ours)


def _node_of_family(held: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """A whole model's VAE has the scale of its family, by its UNet; None where it is alone in the file."""
    unet = under(held, PREFIXES["unet"])
    if not unet:
        return None
    return {"params": {"scale_factor": family_of({"unet": unet}).networks["vae"].defaults["scale_factor"]}}


def _own_names(tensors: Mapping[str, Tensor], params: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """diffusers' names -> SD's."""
    renamed_tensors = names.rename(tensors, names.autoencoder_reading_table(params))
    return names.reshape_vae_attention(renamed_tensors, dims=4)


def _levels(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the table of names depends on, from diffusers' names."""
    return {
        "ch_mult": [1] * count_names(tensors, "encoder.down_blocks."),
        "num_res_blocks": count_names(tensors, "encoder.down_blocks.0.resnets."),
    }


def _check(tensors: Mapping[str, Tensor], path: Path) -> None:
    if not any(name.startswith(LDM_SIGN) for name in tensors):
        remedy = "Name a VAE of Stable Diffusion: a file, or a folder as diffusers saves it."
        raise UserError("There is no VAE in it", where=path, remedy=remedy)
    conv_in = tensors.get("decoder.conv_in.weight")
    if conv_in is not None and conv_in.ndim == 4 and conv_in.shape[1] != LATENT_CHANNELS:
        what = f"This VAE has {conv_in.shape[1]} latent channels, Stable Diffusion's {LATENT_CHANNELS}"
        raise UserError(what, where=path)
