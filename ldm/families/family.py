"""What a model family is, as data: what `ldm.checkpoints` asks of it. README.md says how to add one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Tensors = Mapping[str, Tensor]
StateDicts = Mapping[str, Tensors]  # network -> its tensors, see `ldm.checkpoints.layout.split`


@dataclass(frozen=True)
class Part:
    """A network: its class, the reader of the params that shapes determine, and defaults of the others.

    inner: for a network of several, key of the node in its params -> (beginning of its tensors' names, the
    part); the rest then says nothing.
    """

    target: str
    shape: Callable[[Tensors], dict[str, Any]] | None
    defaults: Mapping[str, Any]
    inner: Mapping[str, tuple[str, "Part"]] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """A family of models.

    name: as a sentence says it. config: a config file for it. networks: "unet", "vae" and "text_encoder".
    released: (width of the UNet's first level, of its context) of the released models. text_prefix: begins
    the names of text encoders in a single file. has_schedule: whether such a file holds the noise schedule.
    sizes: prediction type -> pixels a side that released models were trained at. guidance_scale: usual.
    bucket_unit: pixels of which the sides of aspect-ratio buckets are multiples.
    """

    name: str
    config: str
    networks: Mapping[str, Part]
    released: tuple[int, int]
    text_prefix: str
    has_schedule: bool
    sizes: Mapping[str, int]
    guidance_scale: float
    bucket_unit: int
