"""Textual inversion, the L2-SP regularizer, and output preservation; all are off by default."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.annotations import PositiveFloat
from ldm.conditioner import Conditioner
from ldm.models.conditioning import Conditioning
from ldm.models.lora import LoRA, lora_off
from ldm.models.lora_layer import SideLayer
from ldm.models.text_encoder import CLIPTextEncoder
from ldm.models.unet import UNetModel

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # by the Trainer's precision


@dataclass(frozen=True)
class LearnedToken:
    """Textual inversion (Gal et al. 2023): a new word for the subject, whose embeddings are trained.

    word: as in prompts, such as <my-dog>; use it as `data.params.identifier`.
    init: known words, whose token embeddings are the initial ones.
    learning_rate: of the embeddings.
    """

    word: str
    init: str
    learning_rate: PositiveFloat = 5e-3


class L2SP:
    """L2-SP regularizer (Li et al. 2018): squared distance of the weights to their initial values.

    beside: layers that change the weights beside them, as a LoRA does: their distance is the squared norm of
    that change, not of their own parameters, which are left out of `parameters`.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, beside: Iterable[SideLayer] = ()):
        self.beside = list(beside)
        parameters = list(parameters)
        self.learning = parameters[0]  # whose device is that of all
        own = {id(p) for layer in self.beside for p in layer.parameters()}
        self.pairs = [(p, p.detach().clone()) for p in parameters if p.requires_grad and id(p) not in own]

    def to(self, device: torch.device) -> None:
        self.pairs = [(p, there.to(device)) for p, there in self.pairs]

    def distance(self) -> Tensor:
        """Squared distance, summed over all trainable weights -> scalar; in float32 under autocast too."""
        with torch.autocast(self.learning.device.type, enabled=False):
            distances = [(p - there).square().sum() for p, there in self.pairs]
            return torch.stack(distances + [layer.squared_norm() for layer in self.beside]).sum()


def frozen_copy(network: nn.Module) -> nn.Module:
    """A copy in eval mode, which training does not change."""
    return copy.deepcopy(network).eval().requires_grad_(False)


class Reference:
    """Output preservation: the base's prediction is the target of prior items (Li and Hoiem 2016).

    The reference model is a copy of the base or, with LoRA, the same networks with the LoRA off. In mixed
    `precision` the copy holds the weights of linear layers and convolutions in the dtype to which autocast
    would cast them at every step, in half of the memory.
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
            networks = tuple(frozen_copy(network) for network in networks)
            for layer in (layer for network in networks for layer in cast_by_autocast(network)):
                layer.to(AUTOCAST.get(precision))
        self.unet, text_encoder = networks
        self.conditioner = Conditioner(text_encoder, without=self.loras)

    def to(self, device: torch.device) -> None:
        self.unet.to(device)
        self.conditioner.text_encoder.to(device)
        self.conditioner.forget()

    @torch.no_grad()
    def condition(self, prompts: Sequence[str], sizes: Tensor | None = None) -> Conditioning:
        """The base's conditioning of B items by their prompts; sizes: [B, 6], as in `Conditioner`."""
        return self.conditioner(prompts, sizes, frozen=True)

    def condition_of(self, batch: dict) -> Conditioning:
        """Of the items of a batch that the base predicts (see `Objective.select`).

        Where some are compared with it, all are told the captions of their class.
        """
        captions = batch["class_caption" if "compared" in batch else "caption"]
        sizes = batch.get("sizes")
        if sizes is not None:
            sizes = sizes[batch["reference_rows"].to(sizes.device, non_blocking=True)]
        return self.condition([captions[k] for k in batch["reference_items"]], sizes)

    @torch.no_grad()
    def predict(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The base's prediction. x: [B, C, h, w], t: [B], `condition` of B items -> [B, C, h, w]."""
        with lora_off(*self.loras):
            return self.unet.predict(x, t, conditioning)


def cast_by_autocast(network: nn.Module) -> list[nn.Module]:
    """The layers whose weights autocast casts: linear layers and convolutions."""
    return [layer for layer in network.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
