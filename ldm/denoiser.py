"""Denoiser: UNet and text encoder, which predict what noisy latents would be without noise, given prompts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache, partial

import torch
from torch import Tensor, nn

from ldm.conditioner import Conditioner
from ldm.cuda_graph import GraphedPrediction
from ldm.diffusion.guidance import ConditionalDenoise
from ldm.diffusion.process import Level, NoiseProcess
from ldm.errors import UserError
from ldm.families.sdxl.conditioning import Sizes
from ldm.models.conditioning import TextEncoding
from ldm.models.lora import LoRA, lora_off
from ldm.models.text_encoder import CLIPTextEncoder
from ldm.models.unet import Prepared, UNetModel


class Denoiser:
    """Prompts -> conditioning -> denoised latents; the networks keep their device and dtype.

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
        self.conditioner = Conditioner(text_encoder, without=self.without)
        self.graph = GraphedPrediction(unet) if graphed else None

    @property
    def networks(self) -> tuple[nn.Module, nn.Module]:
        return self.unet, self.text_encoder

    def encode(
        self, texts: Sequence[str | None], batch_size: int, *, chunked: bool, clip_skip: int | None = None
    ) -> dict[str | None, TextEncoding]:
        """As `Conditioner.encode`, in the UNet's device and dtype."""
        encodings = self.conditioner.encode(texts, batch_size, chunked=chunked, clip_skip=clip_skip)
        return {text: encoding.to(*placement(self.unet)) for text, encoding in encodings.items()}

    def conditioned(
        self, encodings: Sequence[TextEncoding], levels: Sequence[Level], sizes: Sizes | None = None
    ) -> tuple[ConditionalDenoise, list[int]]:
        """B encodings of a prompt -> a denoiser by indices of the distinct ones, and the B indices.

        Encodings are distinct if they are different objects. levels: of all predictions; what depends only on
        them and on the prompts is computed here, once. sizes: of all items, where the UNet takes a vector.
        """
        unique = list({id(encoding): encoding for encoding in encodings}.values())
        number = {id(encoding): i for i, encoding in enumerate(unique)}
        numbers = None if sizes is None else torch.tensor([sizes.numbers()] * len(unique))
        told = self.conditioner.conditioning(TextEncoding.cat(unique), range(len(unique)), numbers)
        with lora_off(*self.without):
            times = torch.tensor([level.t for level in levels], dtype=torch.float32)
            prepared = self.unet.prepare(told, times)
        # Every step has the same rows, or two halves of them where guidance takes two passes
        select = lru_cache(maxsize=2)(prepared.select)
        return partial(self._denoise, select), [number[id(encoding)] for encoding in encodings]

    def _denoise(
        self, select: Callable[[tuple[int, ...]], Prepared], x: Tensor, level: Level, rows: Sequence[int]
    ) -> Tensor:
        """x: [b, C, h, w], B rows -> x0 [B, C, h, w] float32; the UNet computes in its own precision."""
        t = torch.full((len(x),), level.t, dtype=torch.float32, device=x.device)
        with lora_off(*self.without):
            prediction = (self.graph or self.unet.predict)(x, t, select(tuple(rows))).float()
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
            "vector's width": unet.adm_in_channels,
        }

    ours, theirs = kind(model), kind(base)
    other = [f"its {name}: {theirs[name]}, not {ours[name]}" for name in ours if theirs[name] != ours[name]]
    other += model.process.differences(base.process)
    if other:
        what = f"The guidance base does not fit the model, {'; '.join(other)}"
        raise UserError(what, where="guidance_base", remedy="Name the model that this one was tuned from.")


def filler(encodings: Mapping[str | None, TextEncoding]) -> Callable[[str | None, int], TextEncoding]:
    """-> a function: text, length in tokens -> its encoding, with a context [1, length, D].

    It is padded by empty chunks, as by AUTOMATIC1111; None, which is no text, by itself. encodings: those of
    `Denoiser.encode`, including "".
    """

    @cache
    def filled(text: str | None, length: int) -> TextEncoding:
        own, empty = encodings[text].context, encodings["" if text is not None else None].context
        missing = (length - own.shape[1]) // empty.shape[1]
        return encodings[text]._replace(context=torch.cat([own, *[empty] * missing], dim=1))

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
