"""LoRA (Hu et al. 2022): frozen layers learn by two thin matrices beside each, W x + alpha / rank * B A x."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UserError

UNetLayers = Literal["attention", "feed_forward", "projections", "convolutions"]
TextLayers = Literal["attention", "feed_forward"]
KINDS = {  # network -> kind of layers -> ends of their names
    "unet": {
        "attention": r"attn[12]\.(to_[qkv]|to_out\.0)",
        "feed_forward": r"ff\.net\.(0\.proj|2)",
        "projections": r"proj_(in|out)",
        "convolutions": r"(in_layers\.2|out_layers\.3|skip_connection|op|conv)",
    },
    "cond_stage": {"attention": r"self_attn\.(q|k|v|out)_proj", "feed_forward": r"mlp\.fc[12]"},
}


class Factors(nn.Module):
    """What one layer learns: a hook adds it to the layer's output, so the layer keeps its place and its name.

    down: [rank, in, ...] of the layer's own kernel, up: [out, rank, ...], 0 at the start. Both are float32;
    they compute in the dtype of the layer's input. `enabled` False leaves the layer's output as it is.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, *, rank: int, alpha: float):
        super().__init__()
        outside, inside, *kernel = layer.weight.shape
        self.rank = rank
        self.alpha = alpha
        self.enabled = True
        self.down = nn.Parameter(torch.empty(rank, inside, *kernel))
        self.up = nn.Parameter(torch.zeros(outside, rank, *[1] * len(kernel)))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as Linear and Conv2d begin
        self.window = {"stride": layer.stride, "padding": layer.padding} if kernel else None
        layer.register_forward_hook(self.add)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's input -> what is added to its output."""
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if self.window is None:
            thin = F.linear(F.linear(x, down), up)
        else:
            thin = F.conv2d(F.conv2d(x, down, **self.window), up)
        return thin * (self.alpha / self.rank)

    def add(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + self(inputs[0]) if self.enabled else output


class LoRA(nn.Module):
    """The factors of a UNet and a text encoder, under the names of the layers that they stand beside.

    Args:
        rank: of every product; alpha / rank scales it. alpha None: as large as the rank.
        unet, text_encoder: kinds of layers that learn; an empty list leaves the network as it is.
        base_dtype: of the frozen weights; the factors are float32 always.
    """

    def __init__(
        self,
        *,
        rank: int = 8,
        alpha: float | None = None,
        unet: Sequence[UNetLayers] = ("attention",),
        text_encoder: Sequence[TextLayers] = ("attention",),
        base_dtype: Literal["fp32", "bf16"] = "fp32",
    ):
        super().__init__()
        if rank < 1:
            raise UserError(f"rank {rank} is impossible", where="lora", remedy="Choose 1 or more.")
        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        self.kinds = {"unet": unet, "cond_stage": text_encoder}
        self.base_dtype = torch.bfloat16 if base_dtype == "bf16" else torch.float32
        self.parts = nn.ModuleDict({name: nn.Module() for name in self.kinds})

    def attach(self, networks: Mapping[str, nn.Module]) -> None:
        """Freezes the networks; those that learned until now do so beside the chosen layers."""
        for name, network in networks.items():
            learns = any(p.requires_grad for p in network.parameters())
            network.requires_grad_(False).to(self.base_dtype)
            for layer_name, layer in _chosen(network, KINDS[name], self.kinds[name] if learns else ()):
                _put(self.parts[name], layer_name, Factors(layer, rank=self.rank, alpha=self.alpha))

    @classmethod
    def of_file(
        cls,
        networks: Mapping[str, nn.Module],
        layers: Mapping[str, Mapping[str, tuple[Tensor, Tensor, float]]],
        *,
        weight: float = 1.0,
    ) -> Self:
        """`weight` times the factors that `ldm.checkpoints.lora.read_lora` read, beside their layers."""
        lora = cls()
        for part, inner in layers.items():
            for name, (down, up, alpha) in inner.items():
                layer = networks[part].get_submodule(name)
                factors = Factors(layer, rank=len(down), alpha=weight * alpha).to(layer.weight.device)
                with torch.no_grad():
                    factors.down.copy_(down.reshape(factors.down.shape))
                    factors.up.copy_(up.reshape(factors.up.shape))
                _put(lora.parts[part], name, factors.requires_grad_(False))
        return lora

    def factors(self) -> dict[str, dict[str, tuple[Tensor, Tensor, float]]]:
        """Network -> layer -> (down, up, alpha), as `ldm.checkpoints.lora` takes them."""
        return {
            part: {
                name: (module.down.detach(), module.up.detach(), module.alpha)
                for name, module in tree.named_modules()
                if isinstance(module, Factors)
            }
            for part, tree in self.parts.items()
        }


@contextmanager
def factors_off(*loras: LoRA) -> Iterator[None]:
    """Inside, the networks beside which these LoRAs stand compute as the base, to the bit."""
    every = [module for lora in loras for module in lora.modules() if isinstance(module, Factors)]
    before = [factors.enabled for factors in every]
    try:
        for factors in every:
            factors.enabled = False
        yield
    finally:
        for factors, enabled in zip(every, before, strict=True):
            factors.enabled = enabled


def _chosen(
    network: nn.Module, kinds: Mapping[str, str], wanted: Sequence[str]
) -> list[tuple[str, nn.Linear | nn.Conv2d]]:
    """Layers of the wanted kinds, with their names in the network."""
    for kind in wanted:
        if kind not in kinds:
            raise UserError(
                f"`{kind}` is no kind of layers", where="lora", remedy=f"Choose of {', '.join(kinds)}."
            )
    ends = re.compile(rf"(?:^|\.)(?:{'|'.join(kinds[kind] for kind in wanted)})$")
    return [
        (name, layer)
        for name, layer in network.named_modules()
        if wanted and isinstance(layer, nn.Linear | nn.Conv2d) and ends.search(name)
    ]


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    """Registers a module under a dotted name, with plain holders on the way."""
    *path, leaf = name.split(".")
    for word in path:
        if not hasattr(root, word):
            root.add_module(word, nn.Module())
        root = root.get_submodule(word)
    root.add_module(leaf, module)
