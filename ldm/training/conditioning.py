"""Conditioning in training: prompts -> contexts, with caches of token ids and of frozen contexts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.data.prompts import distinct
from ldm.models.attention import index_tensor
from ldm.models.text_encoder import CLIPTextEncoder

KEPT_PROMPTS = 1024  # at most so many are cached: 236 KiB each in SD 1.x


class Conditioner:
    """The text encoder with a cache of token ids and, while it is frozen, of contexts."""

    def __init__(self, text_encoder: CLIPTextEncoder):
        self.text_encoder = text_encoder
        self.ids: dict[str, Tensor] = {}  # prompt -> [M], on the device
        self.contexts: dict[str, Tensor] = {}  # prompt -> [M, D]

    def __call__(self, prompts: Sequence[str], *, frozen: bool) -> tuple[Tensor, list[int]]:
        """B prompts -> contexts [P, M, D] of the distinct ones, and the index of each prompt's context: [B].

        Equal prompts are encoded once per call or, where the encoder is frozen, once until `forget`.
        """
        unique, rows = distinct(prompts)
        if not frozen:
            return self._encode(unique), rows
        if len(unique) + len(self.contexts) > KEPT_PROMPTS:
            self.contexts.clear()
        new = [prompt for prompt in unique if prompt not in self.contexts]
        if new:
            with torch.inference_mode(False), torch.no_grad():  # validation's serve training too
                self.contexts |= zip(new, self._encode(new), strict=True)
        return torch.stack([self.contexts[prompt] for prompt in unique]), rows

    def forget(self) -> None:
        """Empties the caches; to be called when weights, tokens or the device change outside a step."""
        self.ids.clear()
        self.contexts.clear()

    def ids_of(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> token ids [B, M]."""
        if len(prompts) + len(self.ids) > KEPT_PROMPTS:
            self.ids.clear()
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.ids]
        if new:
            with torch.inference_mode(False):
                ids = self.text_encoder.tokenize(new).to(self.text_encoder.device, non_blocking=True)
                self.ids |= zip(new, ids, strict=True)
        return torch.stack([self.ids[prompt] for prompt in prompts])

    def _encode(self, prompts: list[str]) -> Tensor:
        """Distinct prompts -> contexts [P, M, D]."""
        return self.text_encoder(self.ids_of(prompts))


def each(contexts: Tensor, rows: Sequence[int]) -> Tensor:
    """Contexts [P, M, D], and which of them each item has: [B] -> a context for each item [B, M, D]."""
    return contexts.index_select(0, index_tensor(rows, contexts.device))
