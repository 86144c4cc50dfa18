"""The JSON configs of a diffusers folder, from and to the params of our networks and schedule."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.files import parse_json
from ldm.models.vocabulary_files import read_vocabulary

Config = Mapping[str, Any]
VERSION = "0.30.0"  # the oldest diffusers that understands all that is written here
UNET_FIXED = {  # the same in all UNets of Stable Diffusion 1.x, 2.x and XL
    "act_fn": "silu",
    "center_input_sample": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "time_embedding_type": "positional",
}
VECTOR = "text_time"  # the vector beside the timestep: pooled text, and numbers that become sinusoids of
NUMBER_WIDTH = 256
VAE_FIXED = {
    "act_fn": "silu",
    "mid_block_add_attention": True,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
BLOCKS = {True: "CrossAttnDownBlock2D", False: "DownBlock2D"}  # whether a level has transformers
UP_BLOCKS = {True: "CrossAttnUpBlock2D", False: "UpBlock2D"}
CLIP_VOCABULARY, CLIP_BOS, CLIP_EOS = 49408, 49406, 49407  # old configs have wrong ids for it

log = logging.getLogger(__name__)


def unet_params(config: Config, *, where: Path) -> dict[str, Any]:
    """unet/config.json -> the params of `UNetModel`."""
    vector = config.get("addition_embed_type")
    fixed = {"addition_embed_type": vector if vector == VECTOR else None}
    if vector == VECTOR:
        fixed["addition_time_embed_dim"] = NUMBER_WIDTH
    _check(config, UNET_FIXED | fixed, where)
    widths, kinds = config["block_out_channels"], config["down_block_types"]
    if unknown := set(kinds) - set(BLOCKS.values()):
        raise UserError(f"The UNet has blocks of another architecture ({', '.join(unknown)})", where=where)
    return {
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attention_resolutions": [2**level for level, kind in enumerate(kinds) if kind == BLOCKS[True]],
        "context_dim": config["cross_attention_dim"],
        "transformer_depth": config.get("transformer_layers_per_block", 1),
        "use_linear_in_transformer": config.get("use_linear_projection", False),
        "num_groups": config.get("norm_num_groups", 32),
        **({"adm_in_channels": config["projection_class_embeddings_input_dim"]} if vector else {}),
    } | _heads(config, widths, where)


def _heads(config: Config, widths: list[int], where: Path) -> dict[str, int | None]:
    """`num_heads` or `num_head_channels`; diffusers calls the number of heads `attention_head_dim`."""
    given = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    heads = [given] * len(widths) if isinstance(given, int) else list(given)
    if len(set(heads)) == 1:
        return {"num_heads": heads[0], "num_head_channels": None}
    head_widths = {width // n for width, n in zip(widths, heads, strict=True)}
    if len(head_widths) > 1:
        what = f"The numbers of heads {heads} are neither equal nor of equal head width"
        raise UserError(what, where=where)
    return {"num_heads": heads[0], "num_head_channels": head_widths.pop()}


def unet_config(params: Config, *, size: int, factor: int) -> dict[str, Any]:
    """The params of `UNetModel` -> unet/config.json. size: in pixels. factor: pixels per latent cell."""
    widths = [params["model_channels"] * mult for mult in params["channel_mult"]]
    attends = [2**level in params["attention_resolutions"] for level in range(len(widths))]
    head_width, vector = params["num_head_channels"], params.get("adm_in_channels")
    about = {"addition_embed_type": None}
    if vector is not None:
        about = {"addition_embed_type": VECTOR, "addition_time_embed_dim": NUMBER_WIDTH}
        about["projection_class_embeddings_input_dim"] = vector
    heads = [width // head_width for width in widths] if head_width else params["num_heads"]
    return (
        UNET_FIXED
        | about
        | {
            "_class_name": "UNet2DConditionModel",
            "_diffusers_version": VERSION,
            "attention_head_dim": heads,
            "block_out_channels": widths,
            "cross_attention_dim": params["context_dim"],
            "down_block_types": [BLOCKS[attending] for attending in attends],
            "in_channels": params["in_channels"],
            "layers_per_block": params["num_res_blocks"],
            "norm_num_groups": params["num_groups"],
            "out_channels": params["out_channels"],
            "sample_size": size // factor,
            "transformer_layers_per_block": params["transformer_depth"],
            "up_block_types": [UP_BLOCKS[attending] for attending in reversed(attends)],
            "use_linear_projection": params["use_linear_in_transformer"],
        }
    )


def autoencoder_params(config: Config, *, where: Path) -> dict[str, Any]:
    """vae/config.json -> the params of `AutoencoderKL`."""
    unscaled = {"shift_factor": None, "latents_mean": None, "latents_std": None}
    _check(config, VAE_FIXED | unscaled, where)
    widths = config["block_out_channels"]
    return {
        "in_channels": config["in_channels"],
        "z_channels": config["latent_channels"],
        "embed_dim": config["latent_channels"],
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "scale_factor": config.get("scaling_factor", 0.18215),
        "num_groups": config.get("norm_num_groups", 32),
    }


def autoencoder_config(params: Config, *, size: int) -> dict[str, Any]:
    """The params of `AutoencoderKL` -> vae/config.json; size in pixels."""
    if params["z_channels"] != params["embed_dim"]:
        raise UserError("diffusers has no VAE whose z_channels differ from its embed_dim")
    levels = len(params["ch_mult"])
    return VAE_FIXED | {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": VERSION,
        "block_out_channels": [params["ch"] * mult for mult in params["ch_mult"]],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": params["in_channels"],
        "latent_channels": params["z_channels"],
        "layers_per_block": params["num_res_blocks"],
        "norm_num_groups": params["num_groups"],
        "out_channels": params["in_channels"],
        "sample_size": size,
        "scaling_factor": params["scale_factor"],
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def text_encoder_params(config: Config, *, tokenizer: Path | None, pad: int | None) -> dict[str, Any]:
    """config.json of a text encoder -> the params of `CLIPTextEncoder`, with the last layer as context.

    pad: the family's padding token, where the tokenizer names none; None: eos.
    """
    clip = config["vocab_size"] == CLIP_VOCABULARY
    eos = CLIP_EOS if clip else config["eos_token_id"]
    named = None if tokenizer is None else _pad_token_id(tokenizer)
    pad = pad if named is None else named
    params = {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "max_length": config.get("max_position_embeddings", 77),
        "hidden_act": config.get("hidden_act", "quick_gelu"),
        "layer": "last",
        "bos_token_id": CLIP_BOS if clip else config["bos_token_id"],
        "eos_token_id": eos,
        "pad_token_id": None if pad == eos else pad,
    }
    return params if tokenizer is None else params | {"tokenizer": str(tokenizer)}


def text_encoder_config(params: Config) -> dict[str, Any]:
    """The params of `CLIPTextEncoder` -> config.json of a text encoder."""
    projection = params.get("projection_dim")
    return {
        "architectures": ["CLIPTextModel" if projection is None else "CLIPTextModelWithProjection"],
        "attention_dropout": 0.0,
        "bos_token_id": params["bos_token_id"],
        "eos_token_id": params["eos_token_id"],
        "hidden_act": params["hidden_act"],
        "hidden_size": params["hidden_size"],
        "intermediate_size": params["intermediate_size"],
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": params["max_length"],
        "model_type": "clip_text_model",
        "num_attention_heads": params["num_attention_heads"],
        "num_hidden_layers": params["num_hidden_layers"] - (params["layer"] == "penultimate"),
        "pad_token_id": params["eos_token_id"] if params["pad_token_id"] is None else params["pad_token_id"],
        "projection_dim": projection or params["hidden_size"],
        "vocab_size": params["vocab_size"],
    }


def schedule_params(config: Config, *, where: Path) -> dict[str, Any]:
    """scheduler_config.json -> schedule and parameterization; warns where our samplers differ from it."""
    predictions = {theirs: ours for ours, theirs in PREDICTION_TYPES.items()}
    prediction, schedule = config.get("prediction_type", "epsilon"), config.get("beta_schedule", "linear")
    if prediction not in predictions or schedule not in ("linear", "scaled_linear"):
        raise UserError(f"The schedule {schedule} with {prediction} is not supported", where=where)
    if config.get("trained_betas") is not None:
        raise UserError("Schedules with trained_betas are not supported", where=where)
    zero = bool(config.get("rescale_betas_zero_snr"))
    spacing = "trailing" if zero else "leading"
    for key, ours, default in (("steps_offset", 1, 0), ("timestep_spacing", spacing, "leading")):
        if config.get(key, default) != ours:
            log.warning("%s has %s %s; sampling uses %s", where, key, config.get(key, default), ours)
    return {
        "beta_schedule": schedule,
        "linear_start": config.get("beta_start", 0.0001),
        "linear_end": config.get("beta_end", 0.02),
        "timesteps": config.get("num_train_timesteps", 1000),
        "zero_terminal_snr": zero,
        "parameterization": predictions[prediction],
    }


def distilled_scheduler(config: Config) -> str | None:
    """What in a scheduler's config tells of a model that was distilled to few steps; None: nothing does."""
    kind = str(config.get("_class_name", ""))
    trailing = config.get("timestep_spacing") == "trailing" and not config.get("rescale_betas_zero_snr")
    return kind if kind.startswith(("LCM", "TCD")) or (trailing and "Ancestral" in kind) else None


def schedule_config(config: Config) -> dict[str, Any]:
    """Schedule and parameterization -> scheduler_config.json, of the DDIM scheduler equal to our sampler."""
    zero = config.get("zero_terminal_snr", False)
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": VERSION,
        "beta_end": config["linear_end"],
        "beta_schedule": config["beta_schedule"],
        "beta_start": config["linear_start"],
        "clip_sample": False,
        "num_train_timesteps": config["timesteps"],
        "prediction_type": PREDICTION_TYPES[config["parameterization"]],
        "rescale_betas_zero_snr": zero,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "trailing" if zero else "leading",
    }


def special_tokens(params: Config, vocabulary: Mapping[str, int]) -> dict[str, str]:
    """The params of `CLIPTextEncoder` -> special_tokens_map.json; the unknown token is eos, as in CLIP."""
    tokens = {index: token for token, index in vocabulary.items()}
    bos, eos = tokens[params["bos_token_id"]], tokens[params["eos_token_id"]]
    pad = eos if params["pad_token_id"] is None else tokens[params["pad_token_id"]]
    return {"bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": eos}


def tokenizer_config(params: Config, vocabulary: Mapping[str, int]) -> dict[str, Any]:
    """The params of `CLIPTextEncoder` -> tokenizer_config.json."""
    kind = {"do_lower_case": True, "tokenizer_class": "CLIPTokenizer"}
    return kind | special_tokens(params, vocabulary) | {"model_max_length": params["max_length"]}


def _pad_token_id(tokenizer: Path) -> int | None:
    """The id of the padding token, from tokenizer_config.json or special_tokens_map.json."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (tokenizer / name).is_file():
            token = read_json(tokenizer / name).get("pad_token")
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None:
                return read_vocabulary(tokenizer).get(str(token))
    return None


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"The config cannot be read: {error}", where=path) from error
    if not isinstance(content, dict):
        raise UserError("The config is not a JSON object", where=path)
    return content


def _check(config: Config, fixed: Config, where: Path) -> None:
    other = {key: config[key] for key, value in fixed.items() if key in config and config[key] != value}
    if other:
        said = ", ".join(f"{key} {value!r}" for key, value in other.items())
        raise UserError(f"This is not Stable Diffusion 1.x, 2.x or XL: its config says {said}", where=where)
