"""The scale of PEFT's LoRAs: its files hold no alpha, a config beside the tensors or in their header does."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.checkpoints.lora_names import READ_PREFIXES
from ldm.errors import UserError
from ldm.files import parse_json

HEADER = "lora_adapter_metadata"  # key of the file's metadata, by diffusers
FILE = "adapter_config.json"  # beside PEFT's own adapter_model.safetensors
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
KEYS = ("lora_alpha", "use_rslora", "alpha_pattern")  # what the scale depends on, besides the rank
PATTERN = re.compile(r"[\w.\\^$*+|-]{1,200}")  # of layers: a name, or an expression that is quickly matched
MOST_REPEATS = 3
MOST_ALPHA = 1e6


class LoraScale:
    """Alpha of every layer, from PEFT's config of each network.

    configs: network -> config; under None that of a file which holds a single network.
    """

    def __init__(self, configs: Mapping[str | None, Mapping[str, Any]], *, where: object):
        self.configs = configs
        self.where = where

    def alpha(self, network: str, layer: str, rank: int) -> float:
        """Alpha of a layer, by diffusers' name of it, so that alpha / rank is its scale.

        The scale is lora_alpha / rank or, rank-stabilized (Kalajdzievski 2023), lora_alpha / sqrt(rank).
        Without a config it is 1.
        """
        config = self.configs.get(network, self.configs.get(None))
        if config is None:
            return float(rank)
        patterns = config.get("alpha_pattern") or {}
        found = next((value for key, value in patterns.items() if self._matches(key, layer)), None)
        alpha = config.get("lora_alpha", 8) if found is None else found
        return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)

    def _matches(self, pattern: str, layer: str) -> bool:
        """As in PEFT: a regular expression for the end of a layer's name."""
        if not PATTERN.fullmatch(pattern) or sum(pattern.count(sign) for sign in "*+") > MOST_REPEATS:
            raise UserError(f"The pattern {pattern[:80]!r} names no layer", where=self.where)
        try:
            return re.match(rf"(.*\.)?({pattern})$", layer) is not None
        except re.error as error:
            raise UserError(f"The pattern {pattern!r} names no layer", where=self.where) from error


def read_scale(file: Path, metadata: Mapping[str, str], *, own_format: bool) -> LoraScale:
    """The scale that a LoRA file states. own_format: the file is PEFT's own, which needs its config."""
    if HEADER in metadata:
        packed = _json(metadata[HEADER], where=file)
        configs: dict[str | None, dict[str, Any]] = {}
        for key, value in packed.items():
            network = next((n for n in READ_PREFIXES if key.startswith(f"{n}.")), None)
            name = key if network is None else key.removeprefix(f"{network}.")
            if name in KEYS:
                configs.setdefault(network, {})[name] = value
    elif own_format:
        path = file.with_name(FILE)
        if not path.is_file():
            what = f"The alpha of this LoRA stands in {FILE}, which is not beside it"
            raise UserError(what, where=file, remedy="Get the whole folder.")
        config = _json(path.read_text(encoding="utf-8", errors="replace"), where=path)
        configs = {None: {key: config[key] for key in KEYS if key in config}}
    else:
        configs = {}
    for config in configs.values():
        _check(config, where=file)
    return LoraScale(configs, where=file)


def adapter_file(path: Path) -> Path:
    """The file in a folder of PEFT's; any other path as it is."""
    if not (path / FILE).is_file():
        return path
    return next((path / name for name in ADAPTER_FILES if (path / name).is_file()), path / ADAPTER_FILES[0])


def _check(config: Mapping[str, Any], *, where: object) -> None:
    patterns = config.get("alpha_pattern") or {}
    patterns = patterns if isinstance(patterns, dict) else {"": None}
    for key, value in {"lora_alpha": config.get("lora_alpha", 8), **patterns}.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not -MOST_ALPHA <= value <= MOST_ALPHA:
            raise UserError(f"The LoRA's config has no number as its alpha (`{key}`)", where=where)
    if not isinstance(config.get("use_rslora", False), bool):
        raise UserError("The LoRA's config has a `use_rslora` that is neither true nor false", where=where)


def _json(text: str, *, where: object) -> dict[str, Any]:
    try:
        content = parse_json(text)
    except ValueError as error:
        raise UserError("The LoRA's config is not JSON", where=where) from error
    if not isinstance(content, dict):
        raise UserError("The LoRA's config is not a JSON object", where=where)
    return content
