"""Techniques that need more than a line of the training step; each is off unless a config asks for it."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.models.lora import LoRA, factors_off
from ldm.models.text_encoder import CLIPTextEncoder
from ldm.models.unet import UNetModel
from ldm.training.conditioning import Conditioner

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # by the Trainer's precision


@dataclass(frozen=True)
class NewWord:
    """A word of its own for the subject, beside the vocabulary's (textual inversion, Gal et al. 2023).

    word: as it stands in prompts, such as <my-dog>; use it as `data.params.identifier`.
    init: known words whose vectors it begins with; each of them gives it one vector.
    learning_rate: of the vectors alone.
    """

    word: str
    init: str
    learning_rate: float = 5e-3


class Pull:
    """Squared distance of the weights to where they began (Li et al. 2018, L2-SP)."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.pairs = [(p, p.detach().clone()) for p in parameters if p.requires_grad]

    def to(self, device: torch.device) -> None:
        self.pairs = [(p, there.to(device)) for p, there in self.pairs]

    def distance(self) -> Tensor:
        """Scalar: summed over all weights that learn."""
        return torch.stack([(p - there).square().sum() for p, there in self.pairs]).sum()


class Teacher:
    """Output preservation: the base's prediction is the target of prior items (Li and Hoiem 2016).

    The class is then kept by what the base would do, not by what its images show. Where a LoRA learns, the
    base is the same networks with its factors off; else it is a copy of them. In mixed `precision` the copy
    keeps the weights of linear layers and convolutions as autocast would cast them at every step, in half of
    the memory.
    """

    def __init__(
        self,
        unet: UNetModel,
        text_encoder: CLIPTextEncoder,
        *,
        lora: LoRA | None = None,
        precision: str = "32-true",
    ):
        self.loras = [] if lora is None else [lora]
        networks = (unet, text_encoder)
        if lora is None:
            networks = tuple(copy.deepcopy(network).eval().requires_grad_(False) for network in networks)
            for layer in (layer for network in networks for layer in cast_by_autocast(network)):
                layer.to(AUTOCAST.get(precision))
        self.unet, text_encoder = networks
        self.conditioner = Conditioner(text_encoder)

    def to(self, device: torch.device) -> None:
        self.unet.to(device)
        self.conditioner.text_encoder.to(device)
        self.conditioner.forget()

    @torch.no_grad()
    def predict(self, x: Tensor, t: Tensor, prompts: Sequence[str]) -> Tensor:
        """x: [B, C, h, w], t: [B], B prompts -> the base's prediction [B, C, h, w]."""
        with factors_off(*self.loras):
            return self.unet.predict(x, t, *self.conditioner(prompts, frozen=True))


def cast_by_autocast(network: nn.Module) -> list[nn.Module]:
    """The layers whose weights autocast casts to its dtype before it computes with them."""
    return [layer for layer in network.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
