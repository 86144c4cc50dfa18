"""Whether a config says of its networks and schedule what the base says of itself.

Two models with tensors of the same shapes can differ in all that `ldm.checkpoints.known` lists, and the run
trains and exports by its config.
"""

import json
import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ldm.checkpoints.infer_config import model_config
from ldm.checkpoints.known import PARAMS, SCHEDULE, flat
from ldm.errors import UserError
from ldm.families.sdxl.family import ENCODERS
from ldm.training.latent_diffusion import LatentDiffusion

# A training may set these otherwise than the base: SD 1.x learns another clip skip or padding in some steps.
CHOICES = ("clip_skip", "pad_token_id")
HEADS = ("num_heads", "num_head_channels")

log = logging.getLogger(__name__)


class Setting(NamedTuple):
    """A key of the config, and its values by the base and by the config, which may be equal."""

    key: str
    base: Any
    config: Any

    @property
    def is_choice(self) -> bool:
        """Whether a training may mean it; Lin et al. 2024 rescale the schedule of a trained model."""
        name = self.key.rpartition(".")[2]
        return name in CHOICES or (name == "zero_terminal_snr" and self.config is True)

    def __str__(self) -> str:
        return f"{self.key.rpartition('.')[2]} is {_text(self.base)}, not {_text(self.config)}"


def check_agreement(
    module: LatentDiffusion,
    params: Mapping[str, Any],
    stated: Mapping[str, tuple[Path, Mapping[str, Any]]],
) -> None:
    """Raises UserError, with all keys to set, where a base states other networks or another schedule.

    Only what a file or folder states is compared, not defaults. A clip skip, a padding or a rescaled schedule
    of the config's own is said in a warning.

    module: may be on the meta device. params: of the config's model section. stated: network -> path of its
    base and what that says, see `Model.known`; "all" is the base of all other networks.
    """
    networks = {name: network.state_dict() for name, network in module.networks.items()}
    own = model_config(networks, flat(params) | {"parameterization": module.process.parameterization})
    refused: dict[str, list[Setting]] = {}
    for part, (path, known) in stated.items():
        names = [name for name in networks if name not in stated] if part == "all" else [part]
        for setting in _compared(known, own, names):
            if setting.base == setting.config:
                continue
            if setting.is_choice:
                log.warning("%s says that %s as in the config, which is what is trained", path, setting)
            else:
                refused.setdefault(str(path), []).append(setting)
    if refused:
        found = [setting for inner in refused.values() for setting in inner]
        what = "The config differs from what the base says of itself: " + "; ".join(map(str, found))
        keys = ", ".join(f"{setting.key}={_text(setting.base)}" for setting in found)
        raise UserError(what, where=", ".join(refused), remedy=f"Set {keys}.")


def without_scale(vae: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the node of a VAE by itself says, but for the scale: that of the UNet's base counts."""
    params = (vae or {}).get("params") or {}
    return {"vae": {"params": {key: value for key, value in params.items() if key != "scale_factor"}}}


def _compared(known: Mapping[str, Any], own: Mapping[str, Any], names: Collection[str]) -> Iterator[Setting]:
    """Of the networks `names`, and of the schedule where the UNet is among them."""
    if "unet" in names:
        for key in (key for key in reversed(SCHEDULE) if key in known):  # what is predicted comes first
            yield Setting(f"model.params.process.{key}", known[key], own[key])
        yield from _heads(_params(known, "unet"), own["unet"]["params"])
    for name in names:
        yield from _of_params(name, _params(known, name), own[name]["params"], f"model.params.{name}.params")


def _of_params(
    network: str, stated: Mapping[str, Any], own: Mapping[str, Any], key: str
) -> Iterator[Setting]:
    """What shapes do not determine; the vocabulary is the base's own, and heads have two ways to be said."""
    for name in PARAMS[network]:
        if name in stated and name in own and name not in ("tokenizer", *HEADS):
            yield Setting(f"{key}.{name}", stated[name], own[name])
    for encoder in ENCODERS:
        if encoder in stated and encoder in own:
            inner = f"{key}.{encoder}.params"
            yield from _of_params(network, _params(stated, encoder), own[encoder]["params"], inner)


def _heads(stated: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[Setting]:
    """Heads of the UNet's attentions: a number, or a width that replaces it."""
    if not any(name in stated for name in HEADS):
        return
    number, width = stated.get("num_heads", own["num_heads"]), stated.get("num_head_channels")
    widths = [own["model_channels"] * mult for mult in own["channel_mult"]]
    theirs, ours = (
        [level / w if w else n for level in widths]
        for n, w in ((number, width), (own["num_heads"], own["num_head_channels"]))
    )
    if theirs != ours:
        yield Setting("model.params.unet.params.num_head_channels", width, own["num_head_channels"])
        if width is None:
            yield Setting("model.params.unet.params.num_heads", number, own["num_heads"])


def _params(nodes: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return (nodes.get(name) or {}).get("params") or {}


def _text(value: Any) -> str:
    """A value as an argument KEY=VALUE has it."""
    return value if isinstance(value, str) else json.dumps(value)
