"""Annotations of what a config may set: ranges of numbers, nodes of objects, and whether a value fits."""

import inspect
import typing
from collections import abc
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, NotRequired, TypedDict, Union

from annotated_types import Ge, GroupedMetadata, Gt, Interval, Le, Lt

PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Probability = Annotated[float, Interval(ge=0, le=1)]
Decay = Annotated[float, Interval(ge=0, lt=1)]  # of a moving average; Adam's betas too
Variance = Annotated[float, Interval(gt=0, lt=1)]  # beta of a noise schedule
Timesteps = Annotated[int, Interval(ge=1, le=100_000)]
Seed = Annotated[int, Interval(ge=0, lt=2**32)]  # what every generator takes

LISTS = (list, tuple, abc.Sequence, abc.Collection, abc.Iterable)
DICTS = (dict, abc.Mapping, abc.MutableMapping)
BOUNDS = {  # constraint -> (whether a value satisfies it, how a sentence says it)
    Ge: (lambda value, bound: value >= bound.ge, lambda bound: f"at least {bound.ge}"),
    Gt: (lambda value, bound: value > bound.gt, lambda bound: f"more than {bound.gt}"),
    Le: (lambda value, bound: value <= bound.le, lambda bound: f"at most {bound.le}"),
    Lt: (lambda value, bound: value < bound.lt, lambda bound: f"less than {bound.lt}"),
}


class Node(TypedDict):
    """An object in a config: its class, and the constructor's arguments."""

    target: str
    params: NotRequired[dict[str, Any]]


@dataclass(frozen=True)
class Builds:
    """In `Annotated[Node, Builds(kind)]`: the class that the node's target has to be, or to derive from."""

    kind: type


def node_kind(annotation: Any) -> type | None:
    """The class that a node with this annotation builds; None where the annotation is not of a node."""
    inner = typing.get_args(annotation)
    if typing.get_origin(annotation) is Annotated:
        kinds = [extra.kind for extra in inner[1:] if isinstance(extra, Builds)]
        return kinds[0] if kinds else node_kind(inner[0])
    if typing.get_origin(annotation) in (Union, UnionType):
        return next((kind for kind in map(node_kind, inner) if kind is not None), None)
    return object if annotation is Node else None


def section_kind(annotation: Any) -> type | None:
    """The class of ours that annotates a parameter, for which a config has a mapping of its parameters."""
    if typing.get_origin(annotation) in (Union, UnionType):
        return next((kind for kind in map(section_kind, typing.get_args(annotation)) if kind), None)
    is_class = inspect.isclass(annotation) and not typing.is_typeddict(annotation)
    return annotation if is_class and annotation.__module__.startswith("ldm.") else None


def section_in_list(annotation: Any) -> type | None:
    """The class of ours in the annotation of a list, for which a config has a list of such mappings."""
    if typing.get_origin(annotation) in (Union, UnionType):
        return next((kind for kind in map(section_in_list, typing.get_args(annotation)) if kind), None)
    inner = typing.get_args(annotation)
    return section_kind(inner[0]) if typing.get_origin(annotation) in LISTS and inner else None


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value fits an annotation: an int fits float, a bool does not fit int."""
    kind, inner = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if kind is Annotated:
        return fits(value, inner[0]) and all(_satisfies(value, bound) for bound in _bounds(annotation))
    if kind in (Union, UnionType):
        return any(fits(value, option) for option in inner)
    if kind is Literal:
        return any(value == option and type(value) is type(option) for option in inner)
    if kind is tuple and isinstance(value, list) and inner and inner[-1] is not Ellipsis:
        return len(value) == len(inner) and all(map(fits, value, inner))
    if kind in LISTS and isinstance(value, list):
        return not inner or all(fits(item, inner[0]) for item in value)
    if (kind in DICTS or typing.is_typeddict(kind)) and isinstance(value, dict):
        return not inner or all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    exact = {float: (int, float), object: (type(value),)}.get(kind, (kind,))
    return type(value) in exact or kind is Any or not inspect.isclass(kind)


def _bounds(annotation: Any) -> list[Ge | Gt | Le | Lt]:
    """The bounds of an `Annotated`; an interval has two."""
    extras = typing.get_args(annotation)[1:]
    flat = (bound for extra in extras for bound in (extra if isinstance(extra, GroupedMetadata) else [extra]))
    return [bound for bound in flat if type(bound) in BOUNDS]


def _satisfies(value: Any, bound: Ge | Gt | Le | Lt) -> bool:
    return value is None or BOUNDS[type(bound)][0](value, bound)


def named(annotation: Any) -> str:
    """An annotation in words: "int (at least 1) or None", "one of ddim, plms"."""
    kind, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if kind is Annotated:
        bounds = ", ".join(BOUNDS[type(bound)][1](bound) for bound in _bounds(annotation))
        return f"{named(inner[0])} ({bounds})" if bounds else named(inner[0])
    if kind in (Union, UnionType):
        return " or ".join(map(named, inner))
    if kind is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if kind is not None:
        return f"{kind.__name__} of {', '.join(map(named, inner))}"
    if annotation is Node:
        return "a mapping with a `target`"
    if section_kind(annotation) is not None:
        return f"a mapping of the keys of {annotation.__name__}"
    return "None" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))
