"""LoRA (Hu et al. 2022): a trainable low-rank update of frozen layers, W x + alpha / rank * B A x."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, Self

import torch
from torch import Tensor, nn

from ldm.annotations import PositiveFloat, PositiveInt
from ldm.errors import UserError
from ldm.models.lora_layer import FixedChange, LoRALayer, OrthogonalLoRALayer, Product, SideLayer
from ldm.models.rank_by_timestep import RankByTimestep, RankMasks

UNetLayers = Literal["attention", "feed_forward", "projections", "convolutions"]
TextLayers = Literal["attention", "feed_forward"]
KINDS = {  # network -> kind of layers -> ends of their names
    "unet": {
        "attention": r"attn[12]\.(to_[qkv]|to_out\.0)",
        "feed_forward": r"ff\.net\.(0\.proj|2)",
        "projections": r"proj_(in|out)",
        "convolutions": r"(in_layers\.2|out_layers\.3|skip_connection|op|conv)",
    },
    "text_encoder": {"attention": r"self_attn\.(q|k|v|out)_proj", "feed_forward": r"mlp\.fc[12]"},
}


class LoRA(nn.Module):
    """LoRA weights for the UNet and the text encoder, under the names of their layers.

    Args:
        rank: rank of every update. alpha: the update is scaled by alpha / rank; None is alpha = rank.
        unet, text_encoder: kinds of layers to adapt; an empty list leaves the network as it is.
        base_dtype: dtype of the frozen weights; LoRA weights are float32, but with `bf16-true`.
        rank_by_timestep: T-LoRA, where given: fewer ranks at noisier timesteps.
    """

    def __init__(
        self,
        *,
        rank: PositiveInt = 8,
        alpha: PositiveFloat | None = None,
        unet: Sequence[UNetLayers] = ("attention",),
        text_encoder: Sequence[TextLayers] = ("attention",),
        base_dtype: Literal["fp32", "bf16"] = "fp32",
        rank_by_timestep: RankByTimestep | None = None,
    ):
        super().__init__()
        if rank < 1:
            raise UserError(f"rank {rank} is impossible", where="lora", remedy="Choose 1 or more.")
        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        self.kinds = {"unet": unet, "text_encoder": text_encoder}
        self.base_dtype = torch.bfloat16 if base_dtype == "bf16" else torch.float32
        self.rank_by_timestep = rank_by_timestep
        self.masks: RankMasks | None = None
        self.layers = nn.ModuleDict({name: nn.Module() for name in self.kinds})

    def attach(self, networks: Mapping[str, nn.Module], *, timesteps: int = 1000) -> None:
        """Freezes the networks, and adds LoRA weights to the chosen layers of those that were trainable.

        timesteps: of the noise schedule, on which the ranks may depend.
        """
        by_timestep = self.rank_by_timestep
        for name, network in networks.items():
            layers = freeze(network, KINDS[name], self.kinds[name])
            network.to(self.base_dtype)
            for layer_name, layer in layers:
                ortho = name == "unet" and by_timestep is not None and by_timestep.orthogonal
                kind = OrthogonalLoRALayer if ortho else LoRALayer
                put(self.layers[name], layer_name, kind(layer, rank=self.rank, alpha=self.alpha))
        if by_timestep is not None:
            lowest = by_timestep.lowest(self.rank)
            self.mask_ranks(networks["unet"], rank=self.rank, min_rank=lowest, timesteps=timesteps)

    def mask_ranks(self, unet: nn.Module, **ranks: int) -> None:
        """Has the UNet's layers follow its timesteps. ranks: arguments of `RankMasks`."""
        layers = [layer for layer in self.layers["unet"].modules() if isinstance(layer, LoRALayer)]
        if not layers:
            where, remedy = "lora.rank_by_timestep", "Name layers in lora.unet, or take it off."
            raise UserError(
                "Only the UNet has timesteps, and no layer of it learns", where=where, remedy=remedy
            )
        self.masks = RankMasks(layers, **ranks)
        unet.shares_keys = False
        unet.register_forward_pre_hook(self.masks)

    @classmethod
    def of_file(
        cls,
        networks: Mapping[str, nn.Module],
        layers: Mapping[str, Mapping[str, tuple[Tensor, Tensor, float] | Product]],
        *,
        weight: float = 1.0,
        ranks: Mapping[str, int] | None = None,
    ) -> Self:
        """The weights read by `ldm.checkpoints.lora.read_lora`, times `weight`, beside their layers.

        ranks: of `RankMasks`, which the UNet's layers then follow.
        """
        lora = cls()
        for network, inner in layers.items():
            for name, weights in inner.items():
                layer = networks[network].get_submodule(name)
                update = _beside(layer, weights, weight).to(layer.weight.device)
                put(lora.layers[network], name, update.requires_grad_(False))
        if ranks is not None:
            lora.mask_ranks(networks["unet"], **ranks)
        return lora

    def weights(self) -> dict[str, dict[str, tuple[Tensor, Tensor, float]]]:
        """Network -> layer -> (down, up, alpha), as `ldm.checkpoints.lora` takes them."""
        found: dict[str, dict[str, tuple[Tensor, Tensor, float]]] = {}
        for network, tree in self.layers.items():
            layers = {name: one for name, one in tree.named_modules() if isinstance(one, LoRALayer)}
            factors = {name: [x.detach() for x in layer.factors()] for name, layer in layers.items()}
            found[network] = {
                name: (down, up, layers[name].alpha * (len(down) / layers[name].rank))
                for name, (down, up) in factors.items()
            }
        return found


@torch.no_grad()
def _beside(
    layer: nn.Linear | nn.Conv2d, weights: tuple[Tensor, Tensor, float] | Product, weight: float
) -> SideLayer:
    """A file's weights beside their layer, times `weight`."""
    if not isinstance(weights, tuple):
        change = weights.product().reshape(layer.weight.shape) * (weight * weights.alpha / weights.rank)
        return FixedChange(layer, change.to(layer.weight.dtype))
    down, up, alpha = weights
    update = LoRALayer(layer, rank=len(down), alpha=weight * alpha)
    update.down.copy_(down.reshape(update.down.shape))
    update.up.copy_(up.reshape(update.up.shape))
    return update


@contextmanager
def lora_off(*loras: LoRA) -> Iterator[None]:
    """Disables LoRAs inside a `with` block: their networks then compute what the base does, to the bit."""
    every = [module for lora in loras for module in lora.modules() if isinstance(module, SideLayer)]
    before = [layer.enabled for layer in every]
    try:
        for layer in every:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(every, before, strict=True):
            layer.enabled = enabled


def layer_names(kinds: Mapping[str, str], wanted: Collection[str]) -> re.Pattern[str]:
    """The names of layers of the wanted kinds. kinds: of a network, see `KINDS`."""
    return re.compile(rf"(?:^|\.)(?:{'|'.join(kinds[kind] for kind in wanted)})$")


def chosen_layers(
    network: nn.Module, kinds: Mapping[str, str], wanted: Sequence[str]
) -> list[tuple[str, nn.Linear | nn.Conv2d]]:
    """Linear and convolutional layers of the wanted kinds, with their names in the network."""
    for kind in wanted:
        if kind not in kinds:
            raise UserError(
                f"`{kind}` is not a kind of layer", where="lora", remedy=f"Choose from {', '.join(kinds)}."
            )
    ends = layer_names(kinds, wanted)
    return [
        (name, layer)
        for name, layer in network.named_modules()
        if wanted and isinstance(layer, nn.Linear | nn.Conv2d) and ends.search(name)
    ]


def freeze(
    network: nn.Module, kinds: Mapping[str, str], wanted: Sequence[str]
) -> list[tuple[str, nn.Linear | nn.Conv2d]]:
    """Freezes a network -> its layers of the wanted kinds that were trainable, with their names."""
    found = [
        (name, layer)
        for name, layer in chosen_layers(network, kinds, wanted)
        if any(p.requires_grad for p in layer.parameters(recurse=False))
    ]
    network.requires_grad_(False)
    return found


def put(root: nn.Module, name: str, module: nn.Module) -> None:
    """Registers a module under a dotted name; the modules on the way are created empty."""
    *path, leaf = name.split(".")
    for word in path:
        if not hasattr(root, word):
            root.add_module(word, nn.Module())
        root = root.get_submodule(word)
    root.add_module(leaf, module)
