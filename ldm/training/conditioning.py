"""Prompts -> contexts in training: nothing is tokenized or encoded twice where its result stays the same."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.data.prompts import distinct
from ldm.models.text_encoder import CLIPTextEncoder

KEPT_PROMPTS = 1024  # whose ids and contexts are kept at most: 236 KiB each in SD 1.x


class Conditioner:
    """The text encoder, with a cache of ids and, for the time that it is frozen, one of contexts."""

    def __init__(self, text_encoder: CLIPTextEncoder):
        self.text_encoder = text_encoder
        self.ids: dict[str, Tensor] = {}  # prompt -> [M], on the device
        self.contexts: dict[str, Tensor] = {}  # prompt -> [M, D]

    def __call__(self, prompts: Sequence[str], *, frozen: bool) -> tuple[Tensor, list[int]]:
        """B prompts -> the contexts [P, M, D] of the different ones, and which of them each has: [B].

        Equal prompts go through the text encoder once: in a call or, where it is frozen, until `forget`.
        """
        unique, rows = distinct(prompts)
        if not frozen:
            return self._encode(unique), rows
        if len(unique) + len(self.contexts) > KEPT_PROMPTS:
            self.contexts.clear()
        new = [prompt for prompt in unique if prompt not in self.contexts]
        if new:
            with torch.inference_mode(False), torch.no_grad():  # validation's are used in training too
                self.contexts |= zip(new, self._encode(new), strict=True)
        return torch.stack([self.contexts[prompt] for prompt in unique]), rows

    def forget(self) -> None:
        """To be called when weights, words or the device have changed by other means than a training step."""
        self.ids.clear()
        self.contexts.clear()

    def _encode(self, prompts: list[str]) -> Tensor:
        """Different prompts -> contexts [P, M, D]."""
        if len(prompts) + len(self.ids) > KEPT_PROMPTS:
            self.ids.clear()
        new = [prompt for prompt in prompts if prompt not in self.ids]
        if new:
            with torch.inference_mode(False):
                ids = self.text_encoder.tokenize(new).to(self.text_encoder.device, non_blocking=True)
                self.ids |= zip(new, ids, strict=True)
        return self.text_encoder(torch.stack([self.ids[prompt] for prompt in prompts]))
