"""SDXL's two text encoders as one network: CLIP ViT-L/14 and OpenCLIP ViT-bigG/14 (Podell et al. 2023)."""

from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from ldm.annotations import Node
from ldm.config import instantiate
from ldm.errors import UserError
from ldm.families.sdxl.family import CLIP_G, CLIP_L, ENCODERS
from ldm.models.conditioning import TextEncoding
from ldm.models.learned_tokens import LearnedTokens
from ldm.models.text_encoder import CLIPTextEncoder

SIZES_L = {"projection_dim": None}
SIZES_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "projection_dim": 1280}


class PairedTokens(nn.Module):
    """The learned tokens of both encoders: a word's embeddings are {"clip_l": [n, D1], "clip_g": [n, D2]}."""

    def __init__(self, clip_l: LearnedTokens, clip_g: LearnedTokens):
        super().__init__()
        self.clip_l = clip_l
        self.clip_g = clip_g

    @property
    def words(self) -> list[str]:
        return self.clip_l.words

    def __len__(self) -> int:
        return len(self.clip_l)

    def items(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        return ((word, {"clip_l": self.clip_l[word], "clip_g": self.clip_g[word]}) for word in self.words)


class SDXLTextEncoders(nn.Module):
    """Prompts -> token ids [B, 2, M] (`tokenize`) -> context [B, M, D1 + D2], pooled [B, P] (`encode`).

    The context is CLIP-L's beside bigG's, each the hidden state before the last layer, without the final
    norm; the pooled vector is bigG's. Both read the same tokens; bigG's are padded with 0. The names of the
    weights are those of SGM's conditioner, `embedders.0.*` and `embedders.1.*`.

    clip_l, clip_g: nodes of `CLIPTextEncoder`; None: of the released sizes. use_checkpoint: gradient
    checkpointing of each layer, in both. None: a training run chooses; else none.
    """

    unconditional: str | None = None  # no prompt and a dropped caption are zeros, context and pooled vector

    def __init__(
        self,
        *,
        clip_l: Node | None = None,
        clip_g: Node | None = None,
        use_checkpoint: bool | None = False,
    ):
        super().__init__()
        encoders = _encoder(clip_l, CLIP_L | SIZES_L), _encoder(clip_g, CLIP_G | SIZES_G)
        self.embedders = nn.ModuleList(encoders)
        self.use_checkpoint = use_checkpoint
        _check_pair(*encoders)

    @property
    def clip_l(self) -> CLIPTextEncoder:
        return self.embedders[0]

    @property
    def clip_g(self) -> CLIPTextEncoder:
        return self.embedders[1]

    @property
    def context_dim(self) -> int:
        return self.clip_l.context_dim + self.clip_g.context_dim

    @property
    def pooled_dim(self) -> int:
        return self.clip_g.pooled_dim

    @property
    def encoders(self) -> list[CLIPTextEncoder]:
        return list(self.embedders)

    @property
    def weights(self) -> nn.Module:
        """All weights but those of learned tokens."""
        return nn.ModuleList([encoder.weights for encoder in self.embedders])

    @property
    def learned_tokens(self) -> PairedTokens:
        return PairedTokens(self.clip_l.learned_tokens, self.clip_g.learned_tokens)

    def add_token(self, word: str, vectors: Mapping[str, Tensor], *, new: bool = True) -> None:
        """Adds a word to both vocabularies, see `CLIPTextEncoder.add_token` and `PairedTokens`."""
        if not isinstance(vectors, Mapping) or len({len(own) for own in vectors.values()}) != 1:
            what = f"The embedding of `{word}` is not one for both text encoders of Stable Diffusion XL"
            raise UserError(what, where=word, remedy="Use one of the model's own family.")
        for key, encoder in zip(ENCODERS, self.embedders, strict=True):
            encoder.add_token(word, vectors[key], new=new)

    def token_embedding_of(self, word: str) -> dict[str, Tensor]:
        """Token embeddings of a known word, in both encoders."""
        return {
            key: encoder.token_embedding_of(word)
            for key, encoder in zip(ENCODERS, self.embedders, strict=True)
        }

    @property
    def layers(self) -> list[nn.Module]:
        """The transformer blocks of both."""
        return [layer for encoder in self.embedders for layer in encoder.layers]

    @property
    def token_shape(self) -> tuple[int, ...]:
        """The shape of a prompt's ids."""
        return (2, self.max_length)

    @property
    def max_length(self) -> int:
        return self.clip_l.max_length

    @property
    def device(self) -> torch.device:
        return self.clip_l.device

    @property
    def use_checkpoint(self) -> bool | None:
        return self.clip_l.use_checkpoint

    @use_checkpoint.setter
    def use_checkpoint(self, chosen: bool | None) -> None:
        for encoder in self.embedders:
            encoder.use_checkpoint = chosen

    @property
    def tokenizer_name(self) -> str:
        return self.clip_l.tokenizer_name

    @tokenizer_name.setter
    def tokenizer_name(self, name: str) -> None:
        for encoder in self.embedders:
            encoder.tokenizer_name = name

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Prompts -> ids [B, 2, M] int64 on the CPU, see `CLIPTextEncoder.tokenize`."""
        return torch.stack([encoder.tokenize(prompts) for encoder in self.embedders], dim=1)

    def tokenize_chunks(self, prompt: str) -> Tensor:
        """A prompt of any length -> ids [N, 2, M] int64 on the CPU: the same chunks for both encoders."""
        return torch.stack([encoder.tokenize_chunks(prompt) for encoder in self.embedders], dim=1)

    def truncated_tail(self, prompt: str) -> str | None:
        """The end of the prompt that `tokenize` truncates; None if all of it fits."""
        return self.clip_l.truncated_tail(prompt)

    def encode(self, ids: Tensor) -> TextEncoding:
        """ids: [B, 2, M] -> what the UNet's conditioning is made of, of each prompt."""
        return TextEncoding(*self(ids))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids: [B, 2, M] -> context [B, M, D1 + D2], pooled [B, P]."""
        first = self.clip_l(ids[:, 0])
        second, pooled = self.clip_g(ids[:, 1])
        return torch.cat([first, second.to(first.dtype)], dim=2), pooled

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """All weights but CLIP-L's last layer and final norm, which nothing depends on."""
        super().requires_grad_(requires_grad)
        unused = self.clip_l.transformer["text_model"]
        for module in (*unused.encoder.layers[self.clip_l.depth :], unused.final_layer_norm):
            module.requires_grad_(False)
        return self


def _encoder(node: Node | None, released: Mapping[str, Any]) -> CLIPTextEncoder:
    return CLIPTextEncoder(**released) if node is None else instantiate(node)


def _check_pair(clip_l: CLIPTextEncoder, clip_g: CLIPTextEncoder) -> None:
    """Raises UserError for two encoders that do not read the same tokens, or are in the wrong order."""
    where = "text_encoder.params"
    if clip_g.text_projection is None or clip_l.text_projection is not None:
        what = "The pooled vector is of the second text encoder, clip_g, and of it alone"
        remedy = "Give clip_g a projection_dim, and clip_l none; perhaps they are swapped."
        raise UserError(what, where=where, remedy=remedy)
    for name in ("max_length", "vocab_size", "bos_token_id", "eos_token_id"):
        pair = getattr(clip_l, name), getattr(clip_g, name)
        if pair[0] != pair[1]:
            what = f"The text encoders have the {name} {pair[0]} and {pair[1]}, and read the same tokens"
            raise UserError(what, where=where, remedy="Give them the same number.")
