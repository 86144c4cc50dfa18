"""docs/config.md: every key of a config with its kind, default and meaning, read from the signatures.

    python -m ldm.runs.config_page docs/config.md

A meaning is what the class's docstring says after the key's name: "size: height and width in pixels."
"""

import inspect
import re
import sys
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ldm.annotations import named, node_kind, section_in_list, section_kind
from ldm.data.buckets import Buckets
from ldm.data.captions import CaptionShuffle
from ldm.data.concepts import ConceptConfig
from ldm.data.dreambooth import DreamBoothDataModule
from ldm.diffusion.process import ProcessConfig
from ldm.evaluation.photos import PhotoEvaluation
from ldm.evaluation.storybook import StorybookEvaluation
from ldm.families.sdxl.text_encoder import SDXLTextEncoders
from ldm.models.adapter import Adapter
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.lora import LoRA
from ldm.models.rank_by_timestep import RankByTimestep
from ldm.models.text_encoder import CLIPTextEncoder
from ldm.models.unet import UNetModel
from ldm.schema import RunConfig
from ldm.training.dco import DCO
from ldm.training.latent_diffusion import LatentDiffusion
from ldm.training.objective import MinSNR, Objective
from ldm.training.techniques import LearnedToken
from ldm.training.trainable import Trainable

NODES = {  # where a node usually stands -> the class that its target names
    "model.params": LatentDiffusion,
    "model.params.process": ProcessConfig,
    "model.params.objective": Objective,
    "model.params.objective.weighting.params": MinSNR,
    "model.params.objective.subject_loss.params": DCO,
    "model.params.unet.params": UNetModel,
    "model.params.vae.params": AutoencoderKL,
    "model.params.text_encoder.params": CLIPTextEncoder,
    "model.params.text_encoder.params (SDXL)": SDXLTextEncoders,
    "model.params.trainable": Trainable,
    "model.params.trainable.lora.params": LoRA,
    "model.params.trainable.lora.params.rank_by_timestep": RankByTimestep,
    "model.params.trainable.adapter": Adapter,
    "model.params.trainable.learned_token.params": LearnedToken,
    "data.params": DreamBoothDataModule,
    "data.params.concepts": ConceptConfig,
    "data.params.buckets": Buckets,
    "data.params.caption_shuffle": CaptionShuffle,
    "evaluation.params (storybook)": StorybookEvaluation,
    "evaluation.params (photos)": PhotoEvaluation,
}
FROM_RUN = {  # arguments that a run gives, which no config needs to
    RunConfig: ("source",),
    LatentDiffusion: ("seed",),
    DreamBoothDataModule: ("seed", "accumulate"),
}
INTRODUCTION = """# Config keys

Written by `python -m ldm.runs.config_page docs/config.md` from the signatures, the one place of defaults
and ranges. `python main.py --base A.yaml [B.yaml ...] [key.sub=value ...]` merges files from left to
right, then the overrides; a file with `include: [others]` is merged over those, which are looked for
beside it and in the repository's `configs/`. `--dry_run` prints the result with the memory and disk that
it needs. An object is a node: `target` names its class, `params` are the arguments of its constructor. A
key that is unknown, of another type or out of its range is refused before any work, with the nearest valid
name."""


class Key(NamedTuple):
    name: str
    kind: str  # in words: "int (at least 1)"
    default: str  # as YAML has it; "required" without one
    meaning: str  # empty if the docstring says nothing


def page() -> str:
    """The page in Markdown."""
    parts = [INTRODUCTION, _table("Sections of a run", RunConfig)]
    parts += [_table(f"`{where}`", kind) for where, kind in [*_section_classes(), *NODES.items()]]
    return "\n\n".join(parts) + "\n"


def keys_of(kind: type) -> list[Key]:
    """The keys that a class takes from a config, in the order of its signature."""
    hints = typing.get_type_hints(kind if is_dataclass(kind) else kind.__init__, include_extras=True)
    defaults = dict(_defaults(kind))
    meanings = meanings_of(kind, defaults)
    return [
        Key(name, _kind(hints[name]), _yaml(default), meanings.get(name, ""))
        for name, default in defaults.items()
        if name not in FROM_RUN.get(kind, ())
    ]


def meanings_of(kind: type, names: Mapping[str, Any]) -> dict[str, str]:
    """Key -> what the docstrings of a class and its bases say of it, after "key:" or "key, other:"."""
    found: dict[str, str] = {}
    name = f"(?:{'|'.join(map(re.escape, names))})"
    for base in reversed(kind.__mro__[:-1]):
        text = " ".join((base.__doc__ or "").replace("Args:", "").split())
        starts = list(re.finditer(rf"(?:^|(?<=[.)] ))({name}(?:, {name})*): ", text))
        ends = [start.start() for start in starts[1:]] + [len(text)]
        for start, end in zip(starts, ends, strict=False):  # no start has the end of the text
            found |= dict.fromkeys(start[1].split(", "), text[start.end() : end].strip())
    return found


def _section_classes() -> Iterator[tuple[str, type]]:
    """The sections whose keys are fixed: name -> dataclass."""
    for name, hint in typing.get_type_hints(RunConfig, include_extras=True).items():
        if is_dataclass(hint):
            yield name, hint


def _defaults(kind: type) -> Iterator[tuple[str, Any]]:
    if is_dataclass(kind):
        for field in fields(kind):
            made = field.default_factory() if field.default_factory is not MISSING else field.default
            yield field.name, inspect.Parameter.empty if made is MISSING else made
    else:
        for parameter in inspect.signature(kind).parameters.values():
            yield parameter.name, parameter.default


def _kind(hint: Any) -> str:
    if is_dataclass(hint) or section_kind(hint) is not None:
        return "section, below"
    if section_in_list(hint) is not None:
        return "list of sections, below"
    return "node" if node_kind(hint) else named(hint).replace("NoneType", "null").replace("None", "null")


def _yaml(default: Any) -> str:
    if default is inspect.Parameter.empty:
        return "required"
    if is_dataclass(default):
        return ""
    spoken = {None: "null", True: "true", False: "false", "": '""'}
    if isinstance(default, str | bool | None):
        return f"`{spoken.get(default, default)}`"
    return f"`{list(default)}`" if isinstance(default, tuple | list) else f"`{default}`"


def _table(title: str, kind: type) -> str:
    lines = [f"## {title}", "", "| key | kind | default | meaning |", "|---|---|---|---|"]
    lines += [
        f"| `{key.name}` | {key.kind} | {key.default} | {key.meaning.replace('|', chr(92) + '|')} |"
        for key in keys_of(kind)
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
