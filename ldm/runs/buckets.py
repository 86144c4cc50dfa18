"""Aspect-ratio buckets in a run: their unit is the networks', and a run says which buckets it has."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ldm.config import instantiate
from ldm.data.dreambooth import DreamBoothDataModule
from ldm.errors import UserError
from ldm.families.known import released_family
from ldm.schema import RunConfig


def build_data(config: RunConfig, module: Any) -> Any:
    """The data module of a config, with the unit of the networks where its buckets name none."""
    data = instantiate(config.data)
    if lacks_unit(data):
        data.unit = bucket_unit(module.networks)
    return data


def lacks_unit(data: Any) -> bool:
    """Whether photos are in buckets whose unit is that of the networks."""
    return isinstance(data, DreamBoothDataModule) and data.buckets is not None and data.unit is None


def bucket_unit(networks: Mapping[str, nn.Module]) -> int:
    """Pixels of which the sides of buckets are multiples: the family's, of smaller networks the least."""
    family = released_family(networks["unet"].state_dict())
    return _least(networks) if family is None else family.bucket_unit


def check_unit(data: DreamBoothDataModule, networks: Mapping[str, nn.Module]) -> None:
    """Raises UserError for a unit of buckets that the networks cannot halve as often as they do."""
    least = _least(networks)
    if data.buckets is not None and data.unit % least:
        what = f"A unit of {data.unit} pixels is no multiple of the {least} that the networks take"
        remedy = f"Set it to {least} or a multiple, or take it off."
        raise UserError(what, where="data.params.buckets.unit", remedy=remedy)


def _least(networks: Mapping[str, nn.Module]) -> int:
    return networks["vae"].factor * networks["unet"].factor


def bucket_facts(data: DreamBoothDataModule) -> str:
    """The buckets in use in one line: "576 x 448: 3 photos, 512 x 512: 1 photo"; empty without buckets."""
    counts = {} if data.buckets is None else data.buckets_in_use.counts()
    return ", ".join(f"{shape}: {photo_count(count)}" for shape, count in counts.items())


def photo_count(count: int) -> str:
    """ "1 photo", "3 photos"."""
    return f"{count} {'photo' if count == 1 else 'photos'}"


def bucket_lines(data: DreamBoothDataModule) -> str:
    """The buckets in use, one a line: "576 x 448 pixels: 3 photos, 48 prior images of each class"."""
    if data.buckets is None:
        return ""
    lines, priors = ["buckets in use, height x width:"], data.prior_counts
    for shape, photos in data.buckets_in_use.counts().items():
        drawn = f", {priors[shape]} prior images of each class" if priors else ""
        lines.append(f"  {shape} pixels: {photo_count(photos)}{drawn}")
    return "\n".join(lines) + "\n"
