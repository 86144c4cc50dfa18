"""Techniques that need more than a line of the training step; each is off unless a config asks for it."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.models.text_encoder import CLIPTextEncoder
from ldm.models.unet import UNetModel
from ldm.training.conditioning import Conditioner


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
    """The base as it was: what it predicts of a noisy prior latent is the target there, in the noise's place.

    The class is then kept by what the base would do, not by what its pictures show (Li and Hoiem 2016).
    """

    def __init__(self, unet: UNetModel, text_encoder: CLIPTextEncoder):
        self.unet = copy.deepcopy(unet).eval().requires_grad_(False)
        self.conditioner = Conditioner(copy.deepcopy(text_encoder).eval().requires_grad_(False))

    def to(self, device: torch.device) -> None:
        self.unet.to(device)
        self.conditioner.text_encoder.to(device)
        self.conditioner.forget()

    @torch.no_grad()
    def predict(self, x: Tensor, t: Tensor, prompts: Sequence[str]) -> Tensor:
        """x: [B, C, h, w], t: [B], B prompts -> the base's prediction [B, C, h, w]."""
        return self.unet.predict(x, t, *self.conditioner(prompts, frozen=True))
