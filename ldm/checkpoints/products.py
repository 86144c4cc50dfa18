"""LoHa and LoKr in files: a layer's change as a Hadamard or a Kronecker product of low-rank matrices.

Names and shapes are those of the LyCORIS library (Yeh et al. 2024). A matrix is stored whole, as two factors,
or with the Tucker decomposition of its kernel: a core [r, r, ...] and factors [r, out] and [r, in].
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.errors import UserError

HADAMARD = (("hada_w1", "hada_t1"), ("hada_w2", "hada_t2"))  # two matrices: names of each, and of its core
KRONECKER = (("lokr_w1", "lokr_t1"), ("lokr_w2", "lokr_t2"))
WHOLE = ("lokr_w1", "lokr_w2")  # what may be stored as it is, not as factors
FACTORS = tuple(f"{stem}_{end}" for stem, _ in HADAMARD + KRONECKER for end in "ab")
NAMES = (*FACTORS, *WHOLE, *(core for _, core in HADAMARD + KRONECKER))


@dataclass(frozen=True)
class ProductWeights:
    """The LoHa or LoKr of one layer, whose weight changes by alpha / rank times the product.

    tensors: by the library's names, see `NAMES`. rank: of the factors; 1 where there are none.
    """

    tensors: Mapping[str, Tensor]
    alpha: float
    rank: int

    def product(self) -> Tensor:
        """[out, in * kernel] in float32."""
        return _product({name: tensor.float() for name, tensor in self.tensors.items()})


def is_product(names: Mapping[str, object]) -> bool:
    """Whether the tensors of a layer, by their names, are a LoHa's or a LoKr's."""
    return any(name in NAMES for name in names)


def product_shape(tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    """The shape of a layer's product, which is not computed; None if the matrices do not fit together."""
    own = {name: tensor for name, tensor in tensors.items() if name in NAMES}
    shapes = {name: torch.empty(tensor.shape, device="meta") for name, tensor in own.items()}
    try:
        return tuple(_product(shapes).shape)
    except (KeyError, IndexError, RuntimeError, ValueError):
        return None


def product_weights(
    tensors: Mapping[str, Tensor], base: Tensor, layer: str, alpha: float | None, *, where: object
) -> ProductWeights:
    """The weights of a layer, if they fit its weight `base`. alpha: None is the rank.

    Raises UserError if they do not, or for tensors of other adapters beside them.
    """
    own = {name: tensor for name, tensor in tensors.items() if name != "alpha"}
    matrices = HADAMARD if any(name.startswith("hada") for name in own) else KRONECKER
    known: set[str] = set()
    for stem, core in matrices:
        pair = {f"{stem}_a", f"{stem}_b"}
        if stem in own and stem in WHOLE:
            known.add(stem)
        elif pair <= own.keys():
            known |= {*pair, core}
        else:
            raise UserError(f"`{layer}` has no {min(pair - own.keys())}", where=where)
    others = sorted(own.keys() - known)
    if others:
        raise UserError(f"`{layer}` has a `{others[0]}` beside `{min(known & own.keys())}`", where=where)
    fits = product_shape(own) == (len(base), base[0].numel())
    ranks = {len(own[name]) for name in own if name in FACTORS and name.endswith("_b")} if fits else set()
    if not fits or len(ranks) > 1 or 0 in ranks:
        shapes = ", ".join(f"{name} {list(own[name].shape)}" for name in sorted(own))
        remedy = "Use it with the model that it was trained on."
        raise UserError(f"`{layer}` takes {list(base.shape)}; not {shapes}", where=where, remedy=remedy)
    rank = next(iter(ranks), 1)
    return ProductWeights(own, float(rank) if alpha is None or not ranks else alpha, rank)


def _product(own: Mapping[str, Tensor]) -> Tensor:
    if any(name.startswith("hada") for name in own):
        one, other = (_matrix(own, *names) for names in HADAMARD)
        return one * other
    one, other = (_matrix(own, *names) for names in KRONECKER)
    return torch.kron(one, other.contiguous())


def _matrix(own: Mapping[str, Tensor], stem: str, core: str) -> Tensor:
    """[rows, columns * kernel]."""
    if stem in own:
        return own[stem].flatten(1)
    a, b = own[f"{stem}_a"], own[f"{stem}_b"]
    if core in own:
        return torch.einsum("ij...,io,jd->od...", own[core], a, b).flatten(1)
    return a.flatten(1) @ b.flatten(1)
