"""Which tensor of a Stable Diffusion file belongs to which network: the one table, used both ways.

A file is a flat dict of names. `split` takes it apart into the three networks, each with the names of its
own module; `join` puts them together again, with all else that other tools expect to find in the file. The
networks carry SD's names inside, so for SD v1 single files (CompVis) the table is three prefixes.
"""

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ldm.errors import UserError

PREFIXES = {
    "unet": "model.diffusion_model.",
    "first_stage": "first_stage_model.",
    "cond_stage": "cond_stage_model.",
}
EMA_PREFIX = "model_ema."  # a moving average of the UNet, its names without their dots
SCHEDULE_BUFFERS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
TEXT_MODEL = "transformer.text_model."  # transformers 5 and some older tools leave `text_model.` out
POSITION_IDS = TEXT_MODEL + "embeddings.position_ids"
POSITION_EMBEDDING = TEXT_MODEL + "embeddings.position_embedding.weight"
LOOKS_LIKE = {  # in names of files that hold no complete model
    "lora_": "a LoRA",
    ".lora_A.": "a LoRA",
    "string_to_param": "a textual inversion embedding",
    "emb_params": "a textual inversion embedding",
    "conditioner.embedders.": "a Stable Diffusion XL model",
    "joint_blocks.": "a Stable Diffusion 3 model",
    "double_blocks.": "a Flux model",
    "control_model.": "a ControlNet",
    "down_blocks.": "one network of a diffusers folder",
    "encoder.down.": "an autoencoder (VAE) alone",
    "text_model.": "a text encoder alone",
    "input_blocks.": "a UNet alone",
}

logger = logging.getLogger(__name__)


def split(state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A file's names -> {"unet": {...}, "first_stage": {...}, "cond_stage": {...}} with the modules' own.

    Leaves out what `join` can compute and what only training needed: schedule buffers, position ids, averages
    of weights, losses of the autoencoder.
    """
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PREFIXES}
    stray = []
    for name, tensor in state_dict.items():
        part = next((part for part, prefix in PREFIXES.items() if name.startswith(prefix)), None)
        if part is not None:
            inner = _own_name(name.removeprefix(PREFIXES[part]))
            if not inner.endswith(".position_ids") and not inner.startswith(("loss.", EMA_PREFIX)):
                parts[part][inner] = tensor
        elif name not in SCHEDULE_BUFFERS and not name.startswith(EMA_PREFIX):
            stray.append(name)
    if stray:
        logger.warning("ignored %d tensors that belong to no network: %s", len(stray), ", ".join(stray[:3]))
    return parts


def join(
    parts: Mapping[str, Mapping[str, Tensor]], alphas_cumprod: Tensor | None = None
) -> dict[str, Tensor]:
    """The networks' tensors under SD v1's names, with position ids and, given [T], 12 schedule buffers."""
    joined = {
        PREFIXES[part] + name: tensor for part, inner in parts.items() for name, tensor in inner.items()
    }
    positions = parts.get("cond_stage", {}).get(POSITION_EMBEDDING)  # [M, D]
    if positions is not None:
        joined[PREFIXES["cond_stage"] + POSITION_IDS] = torch.arange(len(positions)).unsqueeze(0)
    return joined if alphas_cumprod is None else joined | schedule_buffers(alphas_cumprod)


def schedule_buffers(alphas_cumprod: Tensor) -> dict[str, Tensor]:
    """The float32 tensors [T] that SD files carry for the schedule; all follow from `alphas_cumprod` [T].

    Ho et al. 2020: eq. 4 (forward process) and eqs. 6, 7 (posterior mean and variance).
    """
    ac = alphas_cumprod.double()
    previous = torch.cat([torch.ones_like(ac[:1]), ac[:-1]])
    alphas = ac / previous
    betas = 1 - alphas
    variance = betas * (1 - previous) / (1 - ac)
    values = (
        betas,
        ac,
        previous,
        ac.sqrt(),
        (1 - ac).sqrt(),
        (1 - ac).log(),
        (1 / ac).sqrt(),
        (1 / ac - 1).sqrt(),
        variance,
        variance.clamp(min=1e-20).log(),  # the variance of the first step is 0
        betas * previous.sqrt() / (1 - ac),
        (1 - previous) * alphas.sqrt() / (1 - ac),
    )
    return {name: value.float() for name, value in zip(SCHEDULE_BUFFERS, values, strict=True)}


def choose_ema(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same names with the UNet's averaged weights in the place of the raw ones."""
    unet = [name for name in state_dict if name.startswith(PREFIXES["unet"])]
    averages = {name: EMA_PREFIX + name.removeprefix("model.").replace(".", "") for name in unet}
    missing = [name for name, average in averages.items() if average not in state_dict]
    if missing or not unet:
        raise UserError(
            f"{len(missing)} of {len(unet)} UNet tensors have no averaged (EMA) weights in this file",
            remedy="Load the raw weights instead.",
        )
    return dict(state_dict) | {name: state_dict[average] for name, average in averages.items()}


def describe(names: Iterable[str]) -> str | None:
    """What a file that holds none of the PREFIXES seems to be, or None if it holds one of them."""
    names = list(names)
    if any(name.startswith(prefix) for prefix in PREFIXES.values() for name in names):
        return None
    return next(
        (what for sign, what in LOOKS_LIKE.items() if any(sign in name for name in names)), "something else"
    )


def _own_name(name: str) -> str:
    """Name inside its module; restores a `text_model.` that is left out."""
    if name.startswith("transformer.") and not name.startswith(TEXT_MODEL):
        return TEXT_MODEL + name.removeprefix("transformer.")
    return name
