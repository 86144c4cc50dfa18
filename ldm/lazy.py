"""Mappings of tensors that are read or computed when they are used."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from torch import Tensor


class Lazy(Mapping[str, Tensor]):
    """Lazy mapping of tensors: each is computed when it is accessed, by a function without arguments."""

    def __init__(self, make: Mapping[str, Callable[[], Tensor]]):
        self._make = dict(make)

    def __getitem__(self, name: str) -> Tensor:
        return self._make[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._make

    def __iter__(self) -> Iterator[str]:
        return iter(self._make)

    def __len__(self) -> int:
        return len(self._make)


def renamed(tensors: Mapping[str, Tensor], table: Mapping[str, str]) -> Lazy:
    """Tensors under other names. table: new name -> old."""
    return Lazy({new: partial(tensors.__getitem__, old) for new, old in table.items()})


def under(tensors: Mapping[str, Tensor], prefix: str) -> Lazy:
    """The tensors whose names begin with a prefix, without it."""
    return renamed(tensors, {n.removeprefix(prefix): n for n in tensors if n.startswith(prefix)})


def prefixed(tensors: Mapping[str, Tensor], prefix: str) -> Lazy:
    """Tensors under their names after a prefix."""
    return renamed(tensors, {prefix + name: name for name in tensors})
