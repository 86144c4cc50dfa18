"""Conditioner: prompts -> what the UNet is told of them, in training, output preservation and sampling."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.families.sdxl.conditioning import size_vector
from ldm.models.conditioning import Conditioning, TextEncoding, distinct
from ldm.models.lora import LoRA, lora_off
from ldm.models.text_encoder import CLIPTextEncoder

log = logging.getLogger(__name__)

KEPT_PROMPTS = 1024  # at most so many are cached: 236 KiB each in SD 1.x


def clip_skip_of(text_encoder: CLIPTextEncoder) -> int:
    """A text encoder's own clip skip; of SDXL's two, which have none, 1."""
    return text_encoder.encoders[0].clip_skip


def padding_of(text_encoder: CLIPTextEncoder) -> list[int] | None:
    """The token that pads prompts, of SDXL's two encoders each; None where they are their family's own."""
    found = [encoder.pad_token_id for encoder in text_encoder.encoders]
    usual = [
        # OpenCLIP's, of SD 2.x and of SDXL's second, pad with 0
        0 if encoder.layer == "penultimate" or encoder.pooled_dim else encoder.eos_token_id
        for encoder in text_encoder.encoders
    ]
    return None if found == usual else found


class Conditioner:
    """The text encoder, with a cache of token ids and, while it is frozen, of encodings.

    without: LoRAs of the text encoder that are off in all encodings.
    """

    def __init__(self, text_encoder: CLIPTextEncoder, *, without: Sequence[LoRA] = ()):
        self.text_encoder = text_encoder
        self.without = tuple(without)
        self.ids: dict[str, Tensor] = {}  # prompt -> [M], on the device
        self.encodings: dict[str, TextEncoding] = {}  # prompt -> its encoding, P = 1
        self._warned: set[str] = set()  # prompts that were truncated

    def __call__(
        self, prompts: Sequence[str], sizes: Tensor | None = None, *, frozen: bool = False
    ) -> Conditioning:
        """The conditioning of B items by their prompts; long ones are truncated.

        Equal prompts are encoded once per call or, where the encoder is frozen, once until `forget`. The
        empty prompt is that of a dropped caption: SDXL's zeros. sizes: as in `conditioning`.
        """
        unique, rows = distinct(prompts)
        return self.conditioning(self._cached(unique) if frozen else self._encode(unique), rows, sizes)

    def encode(
        self, texts: Sequence[str | None], batch_size: int, *, chunked: bool, clip_skip: int | None = None
    ) -> dict[str | None, TextEncoding]:
        """Encodes each distinct text once, without caches -> its context [1, N M, D], pooled [1, V].

        N is 1, or, if `chunked`, the number of the text's chunks, the first of which gives `pooled`;
        otherwise long texts are truncated, with a warning. None is no text: SDXL's zeros, elsewhere as "".
        clip_skip: in place of the text encoder's own, with which `__call__` encodes. Raises UserError where
        there is none.
        """
        unique, text_encoder = list(dict.fromkeys(texts)), self.text_encoder
        how: dict[str, int] = {}
        if clip_skip is not None and clip_skip != clip_skip_of(text_encoder):
            how["clip_skip"] = clip_skip
            for encoder in text_encoder.encoders:
                encoder.check_clip_skip(clip_skip)
        for text in [] if chunked else unique:
            self._warn_if_truncated(text or "")
        ids = [
            text_encoder.tokenize_chunks(text or "") if chunked else text_encoder.tokenize([text or ""])
            for text in unique
        ]
        batches = torch.cat(ids).to(text_encoder.device).split(batch_size)
        with lora_off(*self.without):
            encoding = TextEncoding.cat([text_encoder.encode(batch, **how) for batch in batches])
        chunks = encoding.split([len(own) for own in ids])
        found = {text: own.joined() for text, own in zip(unique, chunks, strict=True)}
        if None in found and text_encoder.unconditional is None:
            found[None] = found[None].zeroed()
        return found

    def conditioning(
        self, encoding: TextEncoding, prompt_index: Sequence[int] | None, sizes: Tensor | None = None
    ) -> Conditioning:
        """The conditioning of B items. prompt_index: [B], which of the P encoded ones each has; None: B = P.

        sizes: [B, 6], original height and width, top and left of the crop, target height and width. Where the
        text encoder gives `pooled`, an item's vector is that of its prompt with these six numbers' sinusoids.
        """
        if prompt_index is not None:
            encoding = encoding.select(prompt_index)
        if encoding.pooled is None:
            return Conditioning(encoding.context)
        if sizes is None:
            raise ValueError("this text encoder's conditioning needs the sizes of the items")
        return Conditioning(encoding.context, size_vector(encoding.pooled, sizes))

    def forget(self) -> None:
        """Empties the caches; to be called when weights, tokens or the device change outside a step."""
        self.ids.clear()
        self.encodings.clear()

    def _cached(self, prompts: list[str]) -> TextEncoding:
        """Distinct prompts -> their encodings by the frozen text encoder."""
        if len(prompts) + len(self.encodings) > KEPT_PROMPTS:
            self.encodings.clear()
        new = [prompt for prompt in prompts if prompt not in self.encodings]
        if new:
            with torch.inference_mode(False), torch.no_grad():  # validation's serve training too
                self.encodings |= zip(new, self._encode(new).split([1] * len(new)), strict=True)
        return TextEncoding.cat([self.encodings[prompt] for prompt in prompts])

    def ids_of(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> token ids [B, M] on the device."""
        if len(prompts) + len(self.ids) > KEPT_PROMPTS:
            self.ids.clear()
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.ids]
        if new:
            with torch.inference_mode(False):
                ids = self.text_encoder.tokenize(new).to(self.text_encoder.device, non_blocking=True)
                self.ids |= zip(new, ids, strict=True)
        return torch.stack([self.ids[prompt] for prompt in prompts])

    def _encode(self, prompts: list[str]) -> TextEncoding:
        """Distinct prompts -> their encodings."""
        with lora_off(*self.without):
            encoding = self.text_encoder.encode(self.ids_of(prompts))
        if "" in prompts and self.text_encoder.unconditional is None:
            given = torch.tensor([prompt != "" for prompt in prompts])
            return encoding.where(given.to(encoding.context.device, non_blocking=True))
        return encoding

    def _warn_if_truncated(self, text: str) -> None:
        cut = None if text in self._warned else self.text_encoder.truncated_tail(text)
        if cut is not None:
            self._warned.add(text)
            room = self.text_encoder.max_length
            log.warning("Only %d tokens fit: %r of %r is cut off", room, cut, text)
