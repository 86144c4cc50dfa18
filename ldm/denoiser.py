"""Denoiser: UNet and text encoder, which predict what noisy latents would be without noise, given prompts."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor, nn

from ldm.cuda_graph import GraphedPrediction
from ldm.diffusion.guidance import ConditionalDenoise
from ldm.diffusion.process import Level, NoiseProcess
from ldm.errors import UserError
from ldm.models.lora import LoRA, lora_off
from ldm.models.text_encoder import CLIPTextEncoder
from ldm.models.unet import Prepared, UNetModel

log = logging.getLogger(__name__)


class Denoiser:
    """Prompts -> contexts -> denoised latents; the networks keep their device and dtype.

    process: of the noise that the UNet was trained on. model_hash: sha256 of the weights' file, if there is
    one. without: LoRAs of these networks that are off in all predictions, which are then those of the base,
    without a copy. graphed: small predictions are launched as CUDA graphs (`GraphedPrediction`), for networks
    that nothing else trains or switches.
    """

    def __init__(
        self,
        unet: UNetModel,
        text_encoder: CLIPTextEncoder,
        *,
        process: NoiseProcess,
        model_hash: str | None = None,
        without: Sequence[LoRA] = (),
        graphed: bool = False,
    ):
        self.unet = unet
        self.text_encoder = text_encoder
        self.process = process
        self.model_hash = model_hash
        self.without = tuple(without)
        self.predict = GraphedPrediction(unet) if graphed else unet.predict
        self._warned: set[str] = set()  # prompts that were truncated

    @property
    def networks(self) -> tuple[nn.Module, nn.Module]:
        return self.unet, self.text_encoder

    def encode(self, texts: Sequence[str], batch_size: int, *, chunked: bool) -> dict[str, Tensor]:
        """Encodes each distinct text once -> its context [N M, D], in the UNet's device and dtype.

        N is 1, or, if `chunked`, the number of the text's chunks; otherwise long texts are truncated, with a
        warning.
        """
        unique, text_encoder = list(dict.fromkeys(texts)), self.text_encoder
        for text in [] if chunked else unique:
            cut = None if text in self._warned else text_encoder.truncated_tail(text)
            if cut is not None:
                self._warned.add(text)
                log.warning("Only %d tokens fit: %r of %r is cut off", text_encoder.max_length, cut, text)
        ids = [
            text_encoder.tokenize_chunks(text) if chunked else text_encoder.tokenize([text])
            for text in unique
        ]
        batches = torch.cat(ids).to(placement(text_encoder)[0]).split(batch_size)
        with lora_off(*self.without):
            rows = torch.cat([text_encoder(batch).to(*placement(self.unet)) for batch in batches])
        chunks = rows.split([len(own) for own in ids])
        return {text: own.flatten(0, 1) for text, own in zip(unique, chunks, strict=True)}

    def conditioned(
        self, contexts: Sequence[Tensor], levels: Sequence[Level]
    ) -> tuple[ConditionalDenoise, list[int]]:
        """B contexts [M, D] -> a denoiser by indices of the distinct ones, and the B indices.

        Contexts are distinct if they are different tensors. levels: of all predictions; what depends only on
        them and on the contexts is computed here, once.
        """
        unique = list({id(context): context for context in contexts}.values())
        number = {id(context): i for i, context in enumerate(unique)}
        with lora_off(*self.without):
            prepared = self.unet.prepare(torch.stack(unique), torch.tensor([level.t for level in levels]))
        return partial(self._denoise, prepared), [number[id(context)] for context in contexts]

    def _denoise(self, prepared: Prepared, x: Tensor, level: Level, rows: Sequence[int]) -> Tensor:
        """x: [b, C, h, w], B rows -> x0 [B, C, h, w] float32; the UNet computes in its own precision."""
        t = torch.full((len(x),), level.t, device=x.device)
        with lora_off(*self.without):
            prediction = self.predict(x, t, prepared, rows).float()
        runs = prediction.unflatten(0, (-1, len(x)))  # [B / b, b, C, h, w]
        return self.process.denoised(runs, x, level).flatten(0, 1)


def require_same_kind(model: Denoiser, base: Denoiser) -> None:
    """Refuses a guidance base whose predictions cannot be combined with those of the model."""

    def kind(denoiser: Denoiser) -> dict[str, object]:
        unet = denoiser.unet
        return {
            "latent channels": unet.in_channels,
            "channels at the first level": unet.model_channels,
            "context width": unet.context_dim,
        }

    ours, theirs = kind(model), kind(base)
    other = [f"its {name}: {theirs[name]}, not {ours[name]}" for name in ours if theirs[name] != ours[name]]
    other += model.process.differences(base.process)
    if other:
        what = f"The guidance base does not fit the model, {'; '.join(other)}"
        raise UserError(what, where="guidance_base", remedy="Name the model that this one was tuned from.")


def filler(contexts: Mapping[str, Tensor]) -> Callable[[str, int], Tensor]:
    """-> a function: text, length in tokens -> context [n, D], padded by empty chunks, as by AUTOMATIC1111.

    contexts: those of `Denoiser.encode`, including "".
    """

    @cache
    def filled(text: str, length: int) -> Tensor:
        missing = (length - len(contexts[text])) // len(contexts[""])
        return torch.cat([contexts[text], *[contexts[""]] * missing])

    return filled


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Networks in eval mode; afterwards every module has its own mode again."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    try:
        for network in networks:
            network.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def placement(network: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a network's weights."""
    parameter = next(network.parameters())
    return parameter.device, parameter.dtype
