"""Key table of single Stable Diffusion files, used both ways: which tensor belongs to which network.

A file is a flat state dict. `split` divides it into the state dicts of the three networks, `join` puts them
together again, with all else that other tools expect to find in the file. The modules have SD's names inside,
so for SD 1.x files (CompVis) the table is three prefixes. Files of SD 2.x and SDXL differ in the text
encoder, see `ldm.families`; diffusers folders in all networks, see `diffusers_names`.
"""

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ldm.checkpoints.ema import EMA_PREFIX, dotted
from ldm.checkpoints.lora_names import any_adapter
from ldm.diffusion.schedule import TERMINAL
from ldm.errors import UserError
from ldm.families.known import family_of
from ldm.families.sd.family import SD2
from ldm.families.sd.openclip import from_openclip, to_openclip
from ldm.families.sdxl import layout as sdxl
from ldm.families.sdxl.family import SDXL
from ldm.families.shapes import CLIP_UNUSED, TEXT_MODEL
from ldm.lazy import prefixed, renamed

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.",
}
LEARNED_TOKENS = "learned_tokens."  # of `CLIPTextEncoder`, in checkpoints of a run
RUN_LORA = "lora.layers."  # of a run's LoRA, in its checkpoints
INVERSION = "embedding_manager."  # of trainers of textual inversion that save the whole model with it
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
UNUSED = (*SCHEDULE_BUFFERS, *sdxl.IGNORED, *sdxl.MARKS)
POSITION_IDS = TEXT_MODEL + "embeddings.position_ids"
POSITION_EMBEDDING = TEXT_MODEL + "embeddings.position_embedding.weight"
OPENCLIP_PREFIX = PREFIXES["text_encoder"] + "model."
OPENCLIP_REST = "openclip_rest"  # tensors that no network uses, kept so that the file can be written again
QUANTIZED = (".scale_weight", ".weight_scale", ".comfy_quant", "scaled_fp8")  # ends of names, by ComfyUI
FOREIGN = {  # parts of names that only files of other models have
    "lora_": "a LoRA",
    "_lora.": "a LoRA",
    ".lora_A.": "a LoRA",
    ".lora.down.": "a LoRA",
    "string_to_param": "a textual inversion embedding",
    "emb_params": "a textual inversion embedding",
    "emp_params": "a textual inversion embedding",
    "clip_g": "a textual inversion embedding of Stable Diffusion XL",
    "joint_blocks.": "a Stable Diffusion 3 model",
    "double_blocks.": "a Flux model",
    "control_model.": "a ControlNet",
    "motion_modules.": "an AnimateDiff motion module",
    "lm_head.": "a language model",
    "model.layers.": "a language model",
    "depth_model.": "a Stable Diffusion 2 depth model",
}
VECTOR = "label_emb."  # of UNets with a vector beside the timestep: SDXL's and its relatives', unCLIP's
PARTIAL = {  # parts of names in files that hold one network
    "down_blocks.": "one network of a diffusers folder",
    "encoder.down.": "an autoencoder (VAE) alone",
    "vision_model.": "a whole CLIP model",
    "visual.": "a whole CLIP model",
    "text_model.": "a text encoder alone",
    "conditioner.embedders.": "text encoders alone",
    "resblocks.": "a text encoder alone",
    "input_blocks.": "a UNet alone",
    "time_embed.": "a UNet alone",
}
NOT_WEIGHTS = ("loss.", EMA_PREFIX, LEARNED_TOKENS)  # beginnings of names inside a network that it has not
LATENT_CHANNELS = 4
OTHER_UNETS = {  # channels that the UNet takes -> what it is for
    9: "an inpainting model",
    8: "an image editing model (InstructPix2Pix)",
    7: "a x4 upscaler",
    5: "a depth-to-image model",
}

logger = logging.getLogger(__name__)


def split(state_dict: Mapping[str, Tensor]) -> dict[str, Mapping[str, Tensor]]:
    """A file's state dict -> {"unet": {...}, "vae": {...}, "text_encoder": {...}} under the modules' names.

    Tensors are read when they are used. Left out is what `join` can compute and what only training needed:
    schedule buffers, position ids, EMA weights, losses of the VAE. A file of SD 2.x or SDXL also has
    OPENCLIP_REST.
    """
    tables: dict[str, dict[str, str]] = {network: {} for network in PREFIXES}  # own name -> the file's
    openclip, encoders, stray = {}, {}, []  # SD 2.x's text encoder, SDXL's two, and what has no place
    for name in state_dict:
        network = next((network for network, prefix in PREFIXES.items() if name.startswith(prefix)), None)
        if name.startswith(OPENCLIP_PREFIX):
            openclip[name.removeprefix(OPENCLIP_PREFIX)] = name
        elif name.startswith(sdxl.PREFIX):
            encoders[name.removeprefix(sdxl.PREFIX)] = name
        elif network is not None:
            inner = _own_name(name.removeprefix(PREFIXES[network]))
            is_used = not (network == "text_encoder" and inner in CLIP_UNUSED)
            if is_used and not inner.endswith(".position_ids") and not is_no_weight(inner):
                if inner in tables[network]:
                    raise UserError(f"`{name}` is in the file under two names")
                tables[network][inner] = name
        elif name not in UNUSED and not name.startswith((EMA_PREFIX, RUN_LORA)):
            stray.append(name)
    if stray:
        logger.warning("Ignored %d tensors that belong to no network: %s", len(stray), ", ".join(stray[:3]))
    state_dicts: dict[str, Mapping[str, Tensor]] = {
        network: renamed(state_dict, table) for network, table in tables.items()
    }
    if openclip:
        state_dicts["text_encoder"], state_dicts[OPENCLIP_REST] = from_openclip(renamed(state_dict, openclip))
    if encoders:
        found = sdxl.from_file(renamed(state_dict, encoders))
        state_dicts["text_encoder"], state_dicts[OPENCLIP_REST] = found
    return state_dicts


def join(
    state_dicts: Mapping[str, Mapping[str, Tensor]],
    alphas_cumprod: Tensor | None = None,
    *,
    v_prediction: bool = False,
) -> dict[str, Tensor]:
    """State dicts of the networks -> one under SD's names, with what else a released file holds.

    That is the 12 schedule buffers, given `alphas_cumprod` [T] (not SDXL's); position ids (SD 1.x and XL);
    OPENCLIP_REST (SD 2.x and XL), see `ldm.families`; and the marks of SDXL's v-prediction.
    """
    state_dicts, family = dict(state_dicts), family_of(state_dicts)
    rest, text_encoder = state_dicts.pop(OPENCLIP_REST, {}), state_dicts.get("text_encoder")
    if family is SD2 and text_encoder:
        state_dicts["text_encoder"] = prefixed(to_openclip(text_encoder, rest), "model.")
    if family is SDXL and text_encoder:
        state_dicts["text_encoder"] = sdxl.to_file(text_encoder, rest)
    prefixes = PREFIXES | {"text_encoder": family.text_prefix}
    joined = {
        prefixes[network] + name: tensor
        for network, inner in state_dicts.items()
        for name, tensor in inner.items()
    }
    if not family.has_schedule:
        zero_terminal_snr = alphas_cumprod is not None and bool(alphas_cumprod[-1] <= TERMINAL)
        joined |= sdxl.marks(v_prediction=v_prediction, zero_terminal_snr=zero_terminal_snr)
        alphas_cumprod = None
    positions = state_dicts.get("text_encoder", {}).get(POSITION_EMBEDDING)  # [M, D]
    if positions is not None:
        joined[PREFIXES["text_encoder"] + POSITION_IDS] = torch.arange(len(positions)).unsqueeze(0)
    return joined if alphas_cumprod is None else joined | schedule_buffers(alphas_cumprod)


def is_no_weight(inner: str) -> bool:
    """Whether a name inside a network is of what only a run's checkpoint or a training has."""
    return inner.startswith(NOT_WEIGHTS) or f".{LEARNED_TOKENS}" in inner


def schedule_buffers(alphas_cumprod: Tensor) -> dict[str, Tensor]:
    """The schedule buffers of SD files, float32 [T] each, computed from `alphas_cumprod` [T].

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


def choose_ema(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The state dict with the UNet's EMA weights in place of the raw ones. Raises UserError without any."""
    unet = [name for name in state_dict if name.startswith(PREFIXES["unet"])]
    averages = {name: EMA_PREFIX + name.removeprefix("model.").replace(".", "") for name in unet}
    missing = [name for name, average in averages.items() if average not in state_dict]
    if missing or not unet:
        raise UserError(
            f"{len(missing)} of {len(unet)} UNet tensors have no EMA weights in this file",
            remedy="Load the raw weights instead.",
        )
    return renamed(state_dict, {name: name for name in state_dict} | averages)


def with_ema_alone(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A file that holds the UNet's EMA weights alone, under the names of raw ones; any other as it is."""
    averages = [name for name in state_dict if name.startswith(EMA_PREFIX)]
    if not averages or any(name.startswith(PREFIXES["unet"]) for name in state_dict):
        return state_dict
    logger.warning("The file holds the EMA weights of the UNet alone: they are taken")
    table = {own: name for name in averages if (own := dotted(name)) is not None}
    return renamed(state_dict, {name: name for name in state_dict} | table)


def check_not_quantized(names: Iterable[str]) -> None:
    """Raises UserError for weights that are to be multiplied by scales in other tensors."""
    scales = [name for name in names if name.endswith(QUANTIZED)]
    if scales:
        what = f"The weights are quantized, with {len(scales)} scales beside them, such as `{scales[0]}`"
        raise UserError(what, remedy="Use the fp16 or bf16 file of the same model, or fp8 without scales.")


def describe(names: Iterable[str]) -> str | None:
    """What kind of model the names suggest; None for networks of Stable Diffusion 1.x, 2.x or XL."""
    names = [name for name in names if not name.startswith((RUN_LORA, INVERSION))]

    def first(signs: Mapping[str, str]) -> str | None:
        return next((what for sign, what in signs.items() if any(sign in name for name in names)), None)

    ours = any(name.startswith(prefix) for prefix in PREFIXES.values() for name in names)
    relative = sdxl.describe_relative(names)
    vector = any(name.startswith(PREFIXES["unet"] + VECTOR) for name in names)
    if vector and any(name.startswith((OPENCLIP_PREFIX, "embedder.")) for name in names):
        relative = relative or "an unCLIP model"
    other = any_adapter(names) or first(FOREIGN) or relative
    return other or (None if ours else first(PARTIAL) or "something else")


def describe_unet(unet: Mapping[str, Tensor]) -> str | None:
    """What a UNet with more input channels is for, such as inpainting; None for text to image."""
    conv_in = unet.get("input_blocks.0.0.weight")  # [width, channels, 3, 3]
    channels = LATENT_CHANNELS if conv_in is None or conv_in.ndim != 4 else conv_in.shape[1]
    return None if channels == LATENT_CHANNELS else OTHER_UNETS.get(channels, "another kind of model")


def _own_name(name: str) -> str:
    """Name inside the module; adds a `text_model.` that some files leave out."""
    if name.startswith("transformer.") and not name.startswith(TEXT_MODEL):
        return TEXT_MODEL + name.removeprefix("transformer.")
    return name
