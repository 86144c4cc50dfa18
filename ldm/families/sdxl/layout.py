"""Key table of SDXL's text encoders in single files, used both ways, and the signs of its relatives.

A file has SGM's names: `conditioner.embedders.0.transformer.text_model.*` is CLIP-L, under the names of SD
1.x; `conditioner.embedders.1.model.*` is bigG under OpenCLIP's. What follows `conditioner.` is renamed here.
"""

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from ldm.families.family import StateDicts
from ldm.families.sd.openclip import from_openclip, to_openclip
from ldm.families.sdxl.family import ENCODERS, SDXL
from ldm.families.shapes import CLIP_UNUSED, TEXT_MODEL
from ldm.lazy import Lazy, prefixed, under

PREFIX = SDXL.text_prefix
FIRST, SECOND = ENCODERS.values()
OPENCLIP = SECOND + "model."
UNET = "model.diffusion_model."
POSITION_IDS = f"{FIRST}{TEXT_MODEL}embeddings.position_ids"
POSITION_EMBEDDING = f"{FIRST}{TEXT_MODEL}embeddings.position_embedding.weight"
IGNORED = ("denoiser.sigmas",)  # SGM's discrete sigmas, which some files hold
MARKS = {
    "v_pred": {"parameterization": "v"},
    "ztsnr": {"zero_terminal_snr": True},
}  # ComfyUI's, of fine-tunes
RELATIVES = {  # beginning of a tensor's name -> what the file is
    f"{PREFIX}embedders.0.model.": "the refiner of Stable Diffusion XL",
    "edm_mean": "Playground 2.5, of the architecture of Stable Diffusion XL, with another noise process",
    "edm_vpred.": "a model of the architecture of Stable Diffusion XL with an EDM noise process",
}
MIDDLE = UNET + "middle_block.1.transformer_blocks.0.attn1.to_q.weight"
SMALLER = "a distilled Stable Diffusion XL with fewer layers (SSD-1B, Segmind Vega or KOALA)"
DISTILLED = ("turbo", "lightning", "hyper", "lcm", "dmd")  # words of titles and names: no tensor tells


def is_sdxl(names: Iterable[str]) -> bool:
    """Whether the names of a single file are of SDXL or its relatives."""
    return any(name.startswith(f"{PREFIX}embedders.") for name in names)


def describe_relative(names: Iterable[str]) -> str | None:
    """What a file with SDXL's names is, if it is not the base model or a fine-tune of it."""
    names = set(names)
    found = (what for sign, what in RELATIVES.items() if any(name.startswith(sign) for name in names))
    smaller = is_sdxl(names) and UNET + "label_emb.0.0.weight" in names and MIDDLE not in names
    return next(found, SMALLER if smaller else None)


def marked(names: Iterable[str]) -> dict[str, object]:
    """What tensors without a use but as a mark say of the training: v-prediction, zero terminal SNR.

    As in ComfyUI, the mark of a zero terminal SNR counts only beside that of v-prediction.
    """
    names = set(names)
    if "v_pred" not in names:
        return {}
    return {key: value for mark, said in MARKS.items() if mark in names for key, value in said.items()}


def marks(*, v_prediction: bool, zero_terminal_snr: bool) -> dict[str, Tensor]:
    """The tensors that mark a file of such training, for clients that know nothing of its metadata."""
    present = {"v_pred": v_prediction, "ztsnr": v_prediction and zero_terminal_snr}
    return {mark: torch.ones(1) for mark in MARKS if present[mark]}


def distilled_word(text: str) -> str | None:
    """A word in a title or file name that tells of a model distilled to few steps."""
    return next((word for word in DISTILLED if word in text.lower()), None)


def from_file(tensors: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Tensors by their names after `conditioner.` -> those of `SDXLTextEncoders`, and logit_scale."""
    second, rest = from_openclip(under(tensors, OPENCLIP), projects=True)
    unused = {POSITION_IDS, *(FIRST + name for name in CLIP_UNUSED)}
    first = [name for name in tensors if not name.startswith(OPENCLIP) and name not in unused]
    make = {name: partial(tensors.__getitem__, name) for name in first}
    return Lazy(make | {SECOND + name: partial(second.__getitem__, name) for name in second}), rest


def to_file(text_encoders: Mapping[str, Tensor], rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_file`, with position ids [1, M] in the dtype of the weights, as in the release."""
    first = prefixed(under(text_encoders, FIRST), FIRST)
    second = prefixed(to_openclip(under(text_encoders, SECOND), rest, projects=True), OPENCLIP)
    positions = text_encoders[POSITION_EMBEDDING]  # [M, D]
    ids = torch.arange(len(positions)).to(positions.dtype).unsqueeze(0)
    return {**first, **second, POSITION_IDS: ids}


def missing_encoder(state_dicts: StateDicts) -> str | None:
    """The text encoder that a model lacks as a whole, in words; None where both are there."""
    text = state_dicts.get("text_encoder", {})
    words = {FIRST: "the first text encoder (CLIP-L)", SECOND: "the second text encoder (OpenCLIP bigG)"}
    return next((what for p, what in words.items() if not any(n.startswith(p) for n in text)), None)
