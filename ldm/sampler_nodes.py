"""Samplers as a config names them: short names, or nodes of any function or class that is allowed."""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any

from ldm.annotations import Builds, Node
from ldm.config import bound, check
from ldm.diffusion.process import Level, NoiseProcess
from ldm.diffusion.samplers import DEFAULT_SPACING, ENDS_CLEAN, SAMPLERS, Sampler, SamplerName
from ldm.diffusion.schedule import Spacing
from ldm.errors import UserError

SamplerNode = SamplerName | Annotated[Node, Builds(Sampler)]


def build_sampler(sampler: SamplerNode | Sampler) -> Sampler:
    """The sampler of a short name or of a node; a function or an object that is one stays as it is.

    Raises UserError for an unknown name, and for a node that is none of a `Sampler`.
    """
    if isinstance(sampler, Mapping):
        check({"sampler": sampler}, {"sampler": SamplerNode})
        return bound(sampler)
    if callable(sampler):
        return sampler
    if sampler not in SAMPLERS:
        *others, last = SAMPLERS
        remedy = f"Choose {', '.join(others)} or {last}."
        raise UserError(f"The sampler {sampler!r} is unknown", remedy=remedy)
    return SAMPLERS[sampler]


def usual_spacing(sampler: SamplerNode | Sampler, *, zero_terminal_snr: bool = False) -> Spacing:
    """The spacing of a sampler that is given none: for one of one's own, trailing."""
    if zero_terminal_snr or not isinstance(sampler, str):
        return "trailing"
    return DEFAULT_SPACING[sampler]


def sampling_levels(
    process: NoiseProcess, sampler: SamplerNode | Sampler, *, steps: int, spacing: Spacing | None
) -> list[Level]:
    """The levels of a sampler's steps and of its end, noisiest first. spacing: None is the usual one.

    One's own sampler ends without noise, as k-diffusion's do. Raises UserError for what the schedule does not
    have.
    """
    clean = not isinstance(sampler, str) or sampler in ENDS_CLEAN
    usual = usual_spacing(sampler, zero_terminal_snr=process.zero_terminal_snr)
    return process.levels(steps, spacing or usual, clean=clean)


def levels_hash(
    process: NoiseProcess, sampler: SamplerNode | Sampler, *, steps: int, spacing: Spacing | None
) -> str:
    """12 hex digits of what a sampling knows of its process: its kind, what is predicted, and the levels.

    Nine digits of each number count, so that the last bit of another version of torch does not.
    """
    levels = sampling_levels(process, sampler, steps=steps, spacing=spacing)
    numbers = [[f"{number:.9g}" for number in level] for level in levels]
    text = json.dumps([type(process).__name__, process.parameterization, numbers])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def sampler_label(sampler: Any) -> str:
    """A sampler in a sentence: its short name, or the dotted name of its node, or of its class."""
    if isinstance(sampler, Mapping):
        return str(sampler.get("target"))
    return sampler if isinstance(sampler, str) else getattr(sampler, "__name__", type(sampler).__name__)
