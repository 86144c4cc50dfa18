"""What a file says of its networks and schedule in its metadata: JSON, types and ranges are checked here.

A model file may be anybody's, and nothing is built of numbers that no network has.
"""

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

from ldm.errors import UserError
from ldm.families.sdxl.family import ENCODERS
from ldm.files import parse_json

CONFIG, SIZE, TRAINING = "ldm.config", "ldm.size", "ldm.training"  # keys of our metadata
NETWORKS = ("unet", "vae", "text_encoder")
PREDICTION_TYPES = {"epsilon": "eps", "v": "v"}  # of modelspec
PIXELS = re.compile(r"[1-9][0-9]{0,3}")
INSTEAD = "Give the config it was trained with: --config YAML."
Check = tuple[Callable[[Any], bool], str]  # whether a value can be, and what can be

log = logging.getLogger(__name__)


def whole(low: int, high: int) -> Check:
    def fits(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    return fits, f"a whole number from {low} to {high}"


def number(low: float, high: float) -> Check:
    def fits(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high

    return fits, f"a number from {low} to {high}"


def one_of(*values: str) -> Check:
    return lambda value: value in values, " or ".join(values)


def optional(check: Check) -> Check:
    fits, what = check
    return lambda value: value is None or fits(value), f"{what}, or null"


TEXT: Check = (lambda value: isinstance(value, str) and 0 < len(value) <= 4096, "text")
TOKEN = whole(0, 2**20)
PARAMS: dict[str, dict[str, Check]] = {  # params of networks that shapes do not determine
    "unet": {
        "num_heads": whole(1, 1024),
        "num_head_channels": optional(whole(1, 4096)),
        "num_groups": whole(1, 1024),
    },
    "vae": {"scale_factor": number(1e-4, 1e4), "num_groups": whole(1, 1024)},
    "text_encoder": {
        "num_attention_heads": whole(1, 1024),
        "hidden_act": one_of("quick_gelu", "gelu"),
        "layer": one_of("last", "penultimate", "penultimate_hidden"),
        "clip_skip": whole(1, 256),
        "tokenizer": TEXT,
        "bos_token_id": TOKEN,
        "eos_token_id": TOKEN,
        "pad_token_id": optional(TOKEN),
    },
}
SCHEDULE: dict[str, Check] = {
    "beta_schedule": one_of("scaled_linear", "linear"),
    "linear_start": number(1e-8, 0.5),
    "linear_end": number(1e-8, 0.999),
    "timesteps": whole(2, 100_000),
    "zero_terminal_snr": (lambda value: isinstance(value, bool), "true or false"),
    "parameterization": one_of("eps", "v", "x0"),
}


WIDTH, DEPTH = whole(1, 2**17), whole(1, 256)
MULTIPLES: Check = (
    lambda value: isinstance(value, list) and 0 < len(value) <= 16 and all(map(whole(1, 64)[0], value)),
    "a list of whole numbers",
)
DEPTHS: Check = (
    lambda value: whole(1, 64)[0](value) or MULTIPLES[0](value),
    "a whole number from 1 to 64, or a list of them",
)
SIZES: dict[str, Check] = {  # params that shapes determine, where a config states them before they are seen
    "model_channels": WIDTH,
    "context_dim": WIDTH,
    "in_channels": WIDTH,
    "out_channels": WIDTH,
    "channel_mult": MULTIPLES,
    "ch_mult": MULTIPLES,
    "ch": WIDTH,
    "z_channels": WIDTH,
    "num_res_blocks": whole(1, 64),
    "transformer_depth": DEPTHS,
    "adm_in_channels": WIDTH,
    "projection_dim": WIDTH,
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "vocab_size": whole(1, 2**20),
    "num_hidden_layers": DEPTH,
    "max_length": whole(3, 2**16),
}


def read_known(metadata: Mapping[str, str], *, where: object) -> tuple[dict[str, Any], int | None]:
    """Metadata of a single file -> (config of its networks and schedule, image size in pixels).

    Raises UserError for what is malformed in our own keys; other tools' are read where they make sense.
    """
    known = flat(read_json_object(metadata, CONFIG, where=where))
    check_known(known, where=where)
    prediction = PREDICTION_TYPES.get(metadata.get("modelspec.prediction_type", ""))
    if prediction and "parameterization" not in known:
        known["parameterization"] = prediction
    size = metadata.get(SIZE)
    if size is not None and not PIXELS.fullmatch(size):
        what = f"The metadata `{SIZE}` is {size[:20]!r}, not a number of pixels"
        raise UserError(what, where=where, remedy=INSTEAD)
    size = size or metadata.get("modelspec.resolution", "").split("x")[0]
    return known, int(size) if PIXELS.fullmatch(size) else None


def flat(params: Mapping[str, Any]) -> dict[str, Any]:
    """Params of a model section as metadata has them: the noise process's keys beside the networks."""
    process = params.get("process")
    inner = process if isinstance(process, Mapping) else {}
    return {key: value for key, value in params.items() if key != "process"} | dict(inner)


def read_json_object(metadata: Mapping[str, str], key: str, *, where: object) -> dict[str, Any]:
    """The JSON object under a key of the metadata; {} without the key. Raises UserError for another thing."""
    try:
        content = parse_json(metadata.get(key, "{}"))
    except ValueError as error:
        raise UserError(f"The metadata `{key}` is not JSON", where=where, remedy=INSTEAD) from error
    if not isinstance(content, dict):
        raise UserError(f"The metadata `{key}` is not a JSON object", where=where, remedy=INSTEAD)
    return content


def check_known(known: Mapping[str, Any], *, where: object) -> None:
    """Raises UserError for a node that is none, or a value of another type or out of its range."""
    for network in NETWORKS:
        _check_node(known.get(network), network, PARAMS[network], where=where)
    _check_values(known, SCHEDULE, "", where=where)


def _check_node(node: Any, key: str, checks: Mapping[str, Check], *, where: object) -> None:
    params = node.get("params") if isinstance(node, dict) else node
    if not isinstance(node, dict | None) or not isinstance(params, dict | None):
        what = f"`{key}` is no node of a network, a mapping with `params`"
        raise UserError(what, where=where, remedy=INSTEAD)
    _check_values(params or {}, checks, f"{key}.params.", where=where)
    for inner in ENCODERS:
        if inner in (params or {}):
            _check_node(params[inner], f"{key}.params.{inner}", checks, where=where)


def check_sizes(params: Mapping[str, Any], *, where: object) -> None:
    """Raises UserError for sizes of a network that none has."""
    _check_values(params, SIZES, "", where=where)


def training_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The config of the run that wrote a file, for defaults; {}, with a warning, if it is malformed."""
    try:
        return read_json_object(metadata, TRAINING, where=None)
    except UserError as error:
        log.warning("Ignored: %s", error.what)
        return {}


def _check_values(
    values: Mapping[str, Any], checks: Mapping[str, Check], prefix: str, *, where: object
) -> None:
    for key, (fits, what) in checks.items():
        if key in values and not fits(values[key]):
            found = repr(values[key])[:40]
            raise UserError(f"`{prefix}{key}` is {found}, not {what}", where=where, remedy=INSTEAD)
