"""Adapters of the LyCORIS library (Yeh et al. 2024) beside frozen layers: DoRA, LoHa, LoKr and OFT."""

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ldm.annotations import PositiveInt
from ldm.errors import UserError
from ldm.models.lora import KINDS, TextLayers, UNetLayers, freeze, put
from ldm.models.lora_layer import WeightChange

AdapterKind = Literal["dora", "loha", "lokr", "oft"]
CLASSES = {  # kind -> module of the library, its class
    "dora": ("lycoris.modules.locon", "LoConModule"),
    "loha": ("lycoris.modules.loha", "LohaModule"),
    "lokr": ("lycoris.modules.lokr", "LokrModule"),
    "oft": ("lycoris.modules.diag_oft", "DiagOFTModule"),
}
ALGORITHMS = {"dora": "lora", "loha": "loha", "lokr": "lokr", "oft": "diag-oft"}  # the library's names


class AdapterLayer(WeightChange):
    """An adapter of one layer: what its change of the weight makes of the input.

    inner: the library's module, float32. Its alpha is its rank, so all its scales are 1.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, inner: nn.Module):
        super().__init__(layer)
        self.inner = inner
        self.beside = [layer]  # in a list, so that its weights are not this module's

    def weight(self) -> Tensor:
        """The layer's weight as the adapter changes it, in float32."""
        base = self.beside[0].weight
        with torch.autocast(base.device.type, enabled=False):
            return self.inner.get_merged_weight(shape=base.shape)[0]

    @torch.no_grad()
    def merged(self) -> Tensor:
        """`weight`, for a file."""
        return self.weight()

    def change(self) -> Tensor:
        """What the adapter adds to the layer's weight, in float32."""
        return self.weight() - self.beside[0].weight.detach()


class Adapter(nn.Module):
    """Adapters for the UNet and the text encoder, by lycoris-lora, under the names of their layers.

    Args:
        kind: "dora" splits a LoRA's weights into magnitude and direction (Liu et al. 2024), "loha" is the
            Hadamard product of two low-rank matrices (Hyeon-Woo et al. 2022), "lokr" a Kronecker product
            (Yeh et al. 2024), "oft" an orthogonal matrix of blocks before the weight (Qiu et al. 2023).
        rank: of every low-rank matrix; for "oft" the size of the blocks, or what divides the layer's width.
        unet, text_encoder: kinds of layers to adapt; an empty list leaves the network as it is.
        factor: of "lokr": size of the first factor; None: as near to the root of the width as can be.
    """

    masks = None  # the same at all timesteps

    def __init__(
        self,
        *,
        kind: AdapterKind,
        rank: PositiveInt = 8,
        unet: Sequence[UNetLayers] = ("attention",),
        text_encoder: Sequence[TextLayers] = ("attention",),
        factor: PositiveInt | None = None,
    ):
        super().__init__()
        if importlib.util.find_spec("lycoris") is None:
            remedy = "Install it with `pip install lycoris-lora`, or take `adapter` off."
            raise UserError(
                "Adapters need lycoris-lora, which is not installed", where="adapter", remedy=remedy
            )
        if factor is not None and kind != "lokr":
            raise UserError(f"A {kind} has no factor", where="adapter.factor", remedy="Take it off.")
        self.kind: AdapterKind = kind
        self.rank = rank
        self.factor = factor
        self.kinds = {"unet": unet, "text_encoder": text_encoder}
        self.layers = nn.ModuleDict({name: nn.Module() for name in self.kinds})

    def attach(self, networks: Mapping[str, nn.Module], *, timesteps: int = 1000) -> None:
        """Freezes the networks, and adds adapters to the chosen layers of those that were trainable."""
        for name, network in networks.items():
            for layer_name, layer in freeze(network, KINDS[name], self.kinds[name]):
                put(self.layers[name], layer_name, AdapterLayer(layer, self._module(layer)))

    def begin(self) -> None:
        """Takes from the base's weights what depends on them: a DoRA's magnitudes are their rows' norms."""
        if self.kind == "dora":
            with torch.no_grad():
                for layer in self.adapted().values():
                    layer.inner.dora_scale.copy_(_row_norms(layer.beside[0].weight))

    def adapted(self) -> dict[tuple[str, str], AdapterLayer]:
        """(network, name of a layer) -> its adapter."""
        return {
            (network, name): module
            for network, tree in self.layers.items()
            for name, module in tree.named_modules()
            if isinstance(module, AdapterLayer)
        }

    @property
    def needs_host(self) -> bool:
        """Whether the host waits for the device in each step: OFT inverts blocks, LoHa copies its scale."""
        return self.kind in ("oft", "loha")

    def _module(self, layer: nn.Linear | nn.Conv2d) -> nn.Module:
        """The library's module for a layer, whose weights need not be there yet."""
        module, name = CLASSES[self.kind]
        kind = getattr(importlib.import_module(module), name)
        more = {"factor": self.factor or -1} if self.kind == "lokr" else {}
        if self.kind != "oft":  # whose alpha is something else, a bound that is off
            more["alpha"] = self.rank
        with torch.device("cpu"):  # it computes with shapes as tensors
            inner = kind("", layer, lora_dim=self.rank, **({"alpha": 0} | more)).float()
        if self.kind == "dora":  # as if it were given `weight_decompose`, for which it reads the weight
            inner.wd = True
            inner.wd_on_out = True
            inner.dora_scale = nn.Parameter(torch.ones(len(layer.weight), *[1] * (layer.weight.ndim - 1)))
        return inner.to(layer.weight.device)


def _row_norms(weight: Tensor) -> Tensor:
    """[out, in, ...] -> norms of its rows [out, 1, ...]."""
    return weight.float().flatten(1).norm(dim=1).view(-1, *[1] * (weight.ndim - 1))
