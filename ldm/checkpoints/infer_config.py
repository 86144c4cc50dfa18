"""Infers the config of a model from the shapes of its tensors.

Shapes determine widths, levels and blocks. What they do not determine (numbers of heads, activations,
prediction type) comes from the file's own config or else from its family, see `ldm.families`.
"""

import logging
from collections.abc import Mapping
from typing import Any

from ldm.errors import UserError
from ldm.families.family import Part, StateDicts, Tensors
from ldm.families.known import family_of, released_family
from ldm.families.sd.family import SD1, SD2
from ldm.lazy import under

SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "linear_start": 0.00085,
    "linear_end": 0.012,
    "timesteps": 1000,
    "zero_terminal_snr": False,
}
MOST = 2**20  # of any size in a network
CLASS_DEFAULTS = {part.target: part.defaults for part in SD1.networks.values()}  # a node leaves these out
V_PREDICTION_STD = 0.09  # std of a norm's bias in SD 2.x: larger in v-prediction models, smaller in eps

logger = logging.getLogger(__name__)


def model_config(state_dicts: StateDicts, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The params of a model section for these tensors: networks with every param explicit, and schedule.

    known: what the file's metadata or the folder's configs say of them; any key may be missing. Raises
    UserError if a network is incomplete, or unknown and not described.
    """
    known = known or {}
    family = family_of(state_dicts)
    config: dict[str, Any] = {}
    for name, part in family.networks.items():
        config[name] = _node(state_dicts.get(name, {}), part, known.get(name), name=name)
        if known.get(name) is None and released_family(state_dicts["unet"]) is None:
            what = "The file does not say which networks it holds, and they are none of a released model"
            raise UserError(what, remedy="Give the config it was trained with.")
    config |= {key: known.get(key, value) for key, value in SCHEDULE.items()}
    parameterization = known.get("parameterization") or infer_prediction_type(state_dicts)
    return config | {"parameterization": parameterization}


def _node(tensors: Tensors, part: Part, node: Mapping[str, Any] | None, *, name: str) -> dict[str, Any]:
    """The node of a network. What neither shapes nor the node tell is the default of the class or family."""
    given = (node or {}).get("params") or {}
    params = {} if part.shape is None else _shape_of(tensors, part, name=name)
    defaults = part.defaults if node is None else CLASS_DEFAULTS.get(part.target, part.defaults)
    params |= {**defaults, **{key: value for key, value in given.items() if key in defaults}}
    for key, (prefix, inner) in part.inner.items():
        params[key] = _node(under(tensors, prefix), inner, given.get(key), name=f"{name}.{key}")
    return {"target": part.target, "params": params}


def _shape_of(tensors: Tensors, part: Part, *, name: str) -> dict[str, Any]:
    """The params that the shapes of a network's tensors determine."""
    try:
        params = part.shape(tensors)
    except KeyError as error:
        remedy = "A VAE of the family completes it: --vae FILE." if name == "vae" else None
        raise UserError(f"The file is not a whole model: its {name} lacks {error}", remedy=remedy) from error
    except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:
        what = f"The {name} in the file has no shape that a network of Stable Diffusion has"
        raise UserError(what) from error
    sizes = [n for value in params.values() for n in (value if isinstance(value, list) else [value])]
    if not all(0 < n <= MOST for n in sizes if not isinstance(n, bool)):
        raise UserError(f"The {name} in the file has no shape that a network of Stable Diffusion has")
    return params


def infer_prediction_type(state_dicts: StateDicts) -> str:
    """ "eps" or "v", for a file that does not say. It is "eps", but for SD 2.x the weights decide."""
    name = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
    if family_of(state_dicts) is not SD2 or name not in state_dicts["unet"]:
        return "eps"
    guess = "v" if state_dicts["unet"][name].float().std() > V_PREDICTION_STD else "eps"
    logger.warning("The file has no prediction type; by its weights it is %r", guess)
    return guess
