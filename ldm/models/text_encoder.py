"""CLIP's text encoder (Radford et al. 2021): prompts -> the context of the UNet's cross-attention."""

from collections.abc import Iterable
from functools import cached_property
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.activations import ACT2FN

from ldm.annotations import NonNegativeInt, PositiveInt
from ldm.errors import UserError
from ldm.models.conditioning import TextEncoding
from ldm.models.learned_tokens import LearnedTokens, find_words
from ldm.models.vocabulary import load_tokenizer
from ldm.models.widths import check_widths

COMMA_BACKTRACK = 20  # a full chunk ends after its last comma, if at most this many tokens follow it


class Tokens(NamedTuple):
    """Token ids of a prompt without bos and eos, and where in the prompt each begins."""

    ids: list[int]
    starts: list[int]


class CLIPTextEncoder(nn.Module):
    """Prompts -> token ids [B, M] (`tokenize`) -> context [B, M, D], pooled [B, P] (`encode`).

    The defaults are SD 1.x. The weights have SD's names, `transformer.text_model.*`, for which `transformer`
    is an `nn.ModuleDict`: the CLIPTextModel of transformers 5 no longer has the level `text_model`.

    vocab_size: tokens. hidden_size: width D. intermediate_size: width of the MLPs.
    num_hidden_layers: transformer blocks. num_attention_heads: of each. max_length: tokens of a prompt, M.
    hidden_act: activation of the MLPs, by transformers' name.
    bos_token_id, eos_token_id: begin and end a prompt.
    layer: whose output is the context, "last" (SD 1.x) or "penultimate" (SD 2.x), both after the final layer
        norm, or "penultimate_hidden", without it (SDXL).
    projection_dim: width P of the pooled vector, a linear map of the last layer's output at eos, after the
        final norm (SDXL's second encoder); None: there is none.
    tokenizer: folder of CLIP's vocabulary, or a name on the Hugging Face hub.
    pad_token_id: pads prompts to max_length; None = eos_token_id (SD 1.x), 0 in SD 2.x.
    use_checkpoint: gradient checkpointing of each layer. None: a training run chooses; else none.
    clip_skip: 2 takes the output of the layer before the last one, 3 of that before it, after the final layer
        norm, as other tools' "Clip skip"; for SD 1.x (`layer` "last").
    """

    unconditional: str | None = ""  # the text of no prompt

    def __init__(
        self,
        *,
        vocab_size: PositiveInt = 49408,
        hidden_size: PositiveInt = 768,
        intermediate_size: PositiveInt = 3072,
        num_hidden_layers: PositiveInt = 12,
        num_attention_heads: PositiveInt = 12,
        max_length: PositiveInt = 77,
        hidden_act: str = "quick_gelu",
        layer: Literal["last", "penultimate", "penultimate_hidden"] = "last",
        projection_dim: PositiveInt | None = None,
        tokenizer: str = "openai/clip-vit-large-patch14",
        bos_token_id: NonNegativeInt = 49406,
        eos_token_id: NonNegativeInt = 49407,
        pad_token_id: NonNegativeInt | None = None,
        use_checkpoint: bool | None = False,
        clip_skip: PositiveInt = 1,
    ):
        super().__init__()
        check_widths("text_encoder", [hidden_size], num_attention_heads=num_attention_heads)
        if hidden_act not in ACT2FN:
            remedy = "CLIP's are quick_gelu and gelu."
            raise UserError(f"{hidden_act!r} is no activation", where="text_encoder", remedy=remedy)
        self.vocab_size, self.max_length = vocab_size, max_length
        self.bos_token_id, self.eos_token_id = bos_token_id, eos_token_id
        self.pad_token_id = eos_token_id if pad_token_id is None else pad_token_id
        self.tokenizer_name, self.use_checkpoint = tokenizer, use_checkpoint
        self.layer, self.num_layers = layer, num_hidden_layers
        self.check_clip_skip(clip_skip)
        self.clip_skip = clip_skip
        self.context_dim = hidden_size
        self.pooled_dim = projection_dim
        self.token_shape = (max_length,)  # of a prompt's ids
        self.depth = num_hidden_layers - (layer != "last") - (clip_skip - 1)  # layers below the context
        config = CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            max_position_embeddings=max_length,
            hidden_act=hidden_act,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=self.pad_token_id,
            attn_implementation="sdpa",
        )
        self.transformer = nn.ModuleDict({"text_model": CLIPTextModel(config)})
        self.text_projection: nn.Parameter | None = None  # [D, P], applied from the right as in OpenCLIP
        if projection_dim is not None:
            self.text_projection = nn.Parameter(torch.empty(hidden_size, projection_dim))
            nn.init.normal_(self.text_projection, std=hidden_size**-0.5)
        self.learned_tokens = LearnedTokens()  # their ids begin at `vocab_size`

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        """CLIP's BPE tokenizer, loaded at first use: the network alone needs no vocabulary files."""
        tokenizer = load_tokenizer(self.tokenizer_name)
        found = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        if found != (self.bos_token_id, self.eos_token_id) or len(tokenizer) > self.vocab_size:
            raise UserError(
                f"The tokenizer has {len(tokenizer)} tokens, bos and eos {found}; the text encoder expects "
                f"{self.vocab_size} at most, bos and eos {(self.bos_token_id, self.eos_token_id)}",
                where=self.tokenizer_name,
                remedy="Use the tokenizer that the text encoder was trained with.",
            )
        return tokenizer

    def add_token(self, word: str, vectors: Tensor, *, new: bool = True) -> None:
        """Adds a word to the vocabulary: n tokens with the embeddings `vectors` [n, D] (textual inversion).

        Prompts hold it as a whole word, in any case of letters (`find_words`). The embeddings are float32,
        whatever the network's weights are, for they may learn. Raises UserError if the word is known already,
        a `new` one also to the tokenizer, or if the embeddings have another width.
        """
        weight = self.transformer["text_model"].embeddings.token_embedding.weight
        if not isinstance(vectors, Tensor):
            what = f"The embedding of `{word}` is one of Stable Diffusion XL, for its two text encoders"
            raise UserError(what, where=word, remedy="Use one of the model's own family.")
        if vectors.ndim != 2 or vectors.shape[1] != weight.shape[1]:
            what = f"The vectors of `{word}` have the shape {list(vectors.shape)}"
            raise UserError(what, where=word, remedy=f"This text encoder takes [n, {weight.shape[1]}].")
        if not word or word != word.strip() or len(vectors) == 0:
            raise UserError(f"{word!r} is no word", where=word, remedy="Choose one such as <my-dog>.")
        same = [known for known in self.learned_tokens.words if known.lower() == word.lower()]
        if same or (new and word in self.tokenizer.get_vocab()):
            remedy = "Choose another one, such as <my-dog>."
            raise UserError(f"The word `{word}` is known already", where=word, remedy=remedy)
        self.learned_tokens.add(word, vectors.detach().clone().to(weight.device, torch.float32))

    def token_embedding_of(self, word: str) -> Tensor:
        """Token embeddings of a known word -> [n, D]."""
        ids = torch.tensor(self._tokenize(word).ids)
        return self.transformer["text_model"].embeddings.token_embedding.weight[ids.to(self.device)]

    def check_clip_skip(self, clip_skip: int) -> None:
        """Raises UserError for a clip skip that this text encoder does not have."""
        if clip_skip > 1 and self.layer != "last":
            what = "Clip skip is of Stable Diffusion 1.x; this context is always of the layer before the last"
            raise UserError(what, where="clip_skip", remedy="Take it off.")
        if not 1 <= clip_skip <= self.num_layers:
            remedy = f"Choose from 1, all layers, to {self.num_layers}."
            raise UserError(f"A clip skip of {clip_skip} is impossible", where="clip_skip", remedy=remedy)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """All weights but those of layers after the context that nothing depends on."""
        super().requires_grad_(requires_grad)
        if self.text_projection is None:
            self.layers[self.depth :].requires_grad_(False)
        return self

    @property
    def encoders(self) -> list["CLIPTextEncoder"]:
        """It alone; SDXL has two."""
        return [self]

    @property
    def weights(self) -> nn.Module:
        """All weights but those of learned tokens."""
        if self.text_projection is None:
            return self.transformer
        both = nn.ModuleList([self.transformer])
        both.register_parameter("text_projection", self.text_projection)
        return both

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer blocks."""
        return self.transformer["text_model"].encoder.layers

    @property
    def device(self) -> torch.device:
        """That of the weights."""
        return self.transformer["text_model"].embeddings.token_embedding.weight.device

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Prompts -> ids [B, M] int64 on the CPU: bos, tokens truncated to M - 2, eos, padding."""
        return self._pad_to_length([self._tokenize(prompt).ids for prompt in prompts])

    def tokenize_chunks(self, prompt: str) -> Tensor:
        """A prompt of any length -> ids [N, M] int64 on the CPU: N chunks, each with bos, eos and padding.

        A prompt is split as in AUTOMATIC1111's web UI: where a chunk is full, or after its last comma, if at
        most COMMA_BACKTRACK tokens follow that; or before a learned word that does not fit as a whole.
        """
        row, starts = self._tokenize(prompt)
        room, chunks = self.max_length - 2, []
        comma = self.tokenizer.get_vocab().get(",</w>") if len(row) > room else None
        while len(row) > room:
            commas = [i for i in range(max(room - COMMA_BACKTRACK, 0), room) if row[i] == comma]
            end = commas[-1] + 1 if commas and row[room] != comma else room
            if row[room] >= self.vocab_size and 0 < (word := starts.index(starts[room])) < room:
                end = word
            chunks.append(row[:end])
            row, starts = row[end:], starts[end:]
        return self._pad_to_length([*chunks, row])

    def _pad_to_length(self, rows: list[list[int]]) -> Tensor:
        """Lists of tokens -> ids [len(rows), M]: bos, tokens truncated to M - 2, eos, padding."""
        ids = torch.full((len(rows), self.max_length), self.pad_token_id)
        for line, row in zip(ids, rows, strict=True):
            kept = [self.bos_token_id, *row[: self.max_length - 2], self.eos_token_id]
            line[: len(kept)] = torch.tensor(kept)
        return ids

    def truncated_tail(self, prompt: str) -> str | None:
        """The end of the prompt that `tokenize` truncates; None if all of it fits."""
        starts = self._tokenize(prompt).starts[self.max_length - 2 :]
        return prompt[starts[0] :] if starts else None

    def _tokenize(self, prompt: str) -> Tokens:
        """The text between learned words goes through the tokenizer, piece by piece."""
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            what = f"The prompt {prompt!a} is not valid text: {error.reason}"
            raise UserError(what, remedy="Write it as UTF-8.") from error
        ids: list[int] = []
        starts: list[int] = []
        first = 0
        for found in [*find_words(prompt, self.learned_tokens.words), None]:
            end = len(prompt) if found is None else found.start
            piece = self.tokenizer(
                prompt[first:end], add_special_tokens=False, verbose=False, return_offsets_mapping=True
            )
            ids += piece.input_ids
            starts += [first + start for start, _ in piece.offset_mapping]
            if found is not None:
                learned = self.learned_tokens.numbers(found.word)
                ids += [self.vocab_size + number for number in learned]
                starts += [end] * len(learned)
                first = found.end
        return Tokens(ids, starts)

    def encode(self, ids: Tensor, *, clip_skip: int | None = None) -> TextEncoding:
        """ids: [B, M] -> what the UNet is told, of each prompt. clip_skip: None is its own."""
        more = () if clip_skip is None else (clip_skip,)
        found = self(ids, *more)  # not `forward`: FSDP and hooks act on calls
        return TextEncoding(found) if isinstance(found, Tensor) else TextEncoding(*found)

    def forward(self, ids: Tensor, clip_skip: int | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """ids: [B, M] -> context: [B, M, D], and with a projection the pooled vector [B, P].

        Attention is causal, and padding is not masked.
        """
        text_model = self.transformer["text_model"]
        layers, norm = text_model.encoder.layers, text_model.final_layer_norm
        depth = self.depth if clip_skip is None else self.num_layers - (clip_skip - 1)
        h = self._through(layers[:depth], text_model.embeddings(inputs_embeds=self._embed(ids)))
        context = h if self.layer == "penultimate_hidden" else norm(h)
        if self.text_projection is None:
            return context
        last = self._through(layers[depth:], h)
        eos = (ids == self.eos_token_id).int().argmax(dim=1)  # the first one; learned tokens have higher ids
        pooled = norm(last[torch.arange(len(ids), device=ids.device), eos]) @ self.text_projection
        return context, pooled

    def _through(self, layers: Iterable[nn.Module], h: Tensor) -> Tensor:
        for layer in layers:
            if self.use_checkpoint and torch.is_grad_enabled():
                h = checkpoint(layer, h, None, is_causal=True, use_reentrant=False, preserve_rng_state=False)
            else:
                h = layer(h, None, is_causal=True)
        return h

    def _embed(self, ids: Tensor) -> Tensor:
        """Token embeddings. ids: [B, M] -> [B, M, D]; learned tokens have the ids from `vocab_size` on."""
        embedding = self.transformer["text_model"].embeddings.token_embedding
        if not self.learned_tokens:
            return embedding(ids)
        new = torch.cat([vectors for _, vectors in self.learned_tokens.items()])
        number = ids - self.vocab_size
        known = embedding(ids.where(number < 0, self.eos_token_id))
        learned = F.embedding(number.clamp(min=0), new).to(known.dtype)
        return torch.where((number < 0).unsqueeze(-1), known, learned)
