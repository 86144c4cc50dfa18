"""Text2Image: prompts and seeds -> samples. The one sampling path: previews, priors, scripts, evaluation.

A sample is a function of its own seed and prompt, independent of the rest of the call and of its batch.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from ldm.checkpoints.find_model import find_model
from ldm.conditioner import clip_skip_of
from ldm.denoiser import Denoiser, evaluating, filler, placement, require_same_kind
from ldm.diffusion.guidance import Denoise, classifier_free_guidance
from ldm.diffusion.process import Level, NoiseProcess
from ldm.diffusion.samplers import Callback, Sampler, ddim
from ldm.diffusion.schedule import Spacing
from ldm.errors import UserError
from ldm.families.sdxl.conditioning import Sizes
from ldm.model_file import ModelFile
from ldm.models.autoencoder import AutoencoderKL, DiagonalGaussian
from ldm.models.conditioning import TextEncoding
from ldm.models.text_encoder import CLIPTextEncoder
from ldm.models.unet import UNetModel
from ldm.precision import Precision, autocast_for, vae_precision
from ldm.randomness import randn
from ldm.sampler_nodes import SamplerNode, build_sampler, sampler_label, sampling_levels

log = logging.getLogger(__name__)


class Sample(NamedTuple):
    image: Image.Image
    latents: Tensor  # [C, h, w] float32 on the CPU, straight from the sampler
    prompt: str
    seed: int


class Text2Image:
    """Sampling pipeline. The networks keep their device and dtype, and may be in training meanwhile.

    process: of the noise that the UNet was trained on. default_size: pixels a side of images whose height or
    width isn't given. model_hash: sha256 of the weights' file, if there is one. guidance_base: predicts for
    the negative prompt in place of the networks (Phunyaphibarn et al. 2025). Raises UserError if it does not
    fit them. cuda_graph: on a GPU, steps of small batches are launched as CUDA graphs, for networks that
    nothing else changes.
    """

    def __init__(
        self,
        unet: UNetModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextEncoder,
        *,
        process: NoiseProcess,
        default_size: int = 512,
        model_hash: str | None = None,
        guidance_base: Denoiser | None = None,
        cuda_graph: bool = False,
    ):
        self.denoiser = Denoiser(unet, text_encoder, process=process, graphed=cuda_graph)
        if guidance_base is not None:
            require_same_kind(self.denoiser, guidance_base)
        self.unet = unet
        self.vae = vae
        self.text_encoder = text_encoder
        self.process = process
        self.default_size = default_size
        self.model_hash = model_hash
        self.guidance_base = guidance_base

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *,
        config: Mapping[str, Any] | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        loras: Sequence[tuple[Path, float]] = (),
        embeddings: Sequence[Path] = (),
        guidance_base: str | Path | Denoiser | None = None,
        vae: str | Path | None = None,
    ) -> "Text2Image":
        """From a Stable Diffusion file, a folder as diffusers saves it, or the folder of a run.

        config: with a `model` section, or the params of one; None takes what its metadata or layout says.
        loras: files, each with the weight at which it is merged. embeddings: textual-inversion files, whose
        tokens prompts may contain; a run's own is read too. vae: a file or folder in place of the model's.
        guidance_base: file or folder of the model that predicts for the negative prompt, or itself. The same
        file is not loaded twice: the LoRAs are attached instead of merged, and off in that prediction.
        """
        how = {"config": config, "device": device, "dtype": dtype}
        file, base, beside = ModelFile(find_model(Path(path)), vae=vae, **how), None, []
        if isinstance(guidance_base, str | Path):
            base = ModelFile(guidance_base, names=("unet", "text_encoder"), **how)
            base.model.require_prediction(base.process.parameterization)
            require_same_kind(file.denoiser(), base.denoiser())
        same = base is not None and base.hash == file.hash
        file.fill(loras=() if same else loras, embeddings=embeddings)
        if same:
            base, beside = file, file.attach(loras)
        elif base is not None:
            base.fill(embeddings=embeddings)
        return cls(
            **file.networks,
            process=file.process,
            default_size=file.model.size(file.process.parameterization),
            model_hash=file.hash,
            guidance_base=base.denoiser(model_hash=base.hash, without=beside) if base else guidance_base,
            cuda_graph=True,
        )

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        seeds: Sequence[int] | None = None,
        negative_prompt: str | None = None,
        steps: int = 50,
        guidance_scale: float = 7.5,
        eta: float = 0.0,
        sampler: SamplerNode | Sampler = "ddim",
        spacing: Spacing | None = None,
        height: int | None = None,
        width: int | None = None,
        sizes: Sizes | None = None,
        init_image: Image.Image | None = None,
        strength: float = 0.75,
        long_prompts: bool = False,
        clip_skip: int | None = None,
        batch_size: int = 8,
        batched_guidance: bool = True,
        precision: Precision = "auto",
        progress: bool | Callable[[int], object] = False,
    ) -> list[Sample]:
        """One sample for each prompt and its seed (0, 1, ...), or of one string for each seed, in batches.

        `negative_prompt` None: SDXL's zeros, else "". `spacing` None: as suits the sampler. `sizes`: told to
        SDXL. `init_image`: of img2img, for the last `strength` of the steps. `long_prompts`: encode in
        chunks. `clip_skip`: None is the text encoder's. `progress`: a bar, or a callable of step counts.
        """
        prompts, seeds, sample = _check_call(prompts, seeds, sampler=sampler, eta=eta, batch_size=batch_size)
        shape, samples = self.latent_shape(height, width), {}
        levels = self._levels(sampler, steps, spacing, None if init_image is None else strength)
        with self._eval(precision), _reporting(progress, len(prompts), steps=len(levels) - 1) as report:
            sizes = Sizes.for_unet(sizes, *(n * self.vae.factor for n in shape[1:]), unet=self.unet)
            how = (levels, guidance_scale, batched_guidance, sizes)
            negative = () if guidance_scale == 1 else (self.negative(negative_prompt),)
            own = clip_skip_of(self.text_encoder)
            reading = {"chunked": long_prompts, "clip_skip": own if clip_skip is None else clip_skip}
            pairs = self._encodings(prompts, negative, batch_size, **reading)
            initial = None if init_image is None else self._posterior(init_image, shape)
            for batch in _batches([encoding.context.shape[1] for encoding, _ in pairs], batch_size):
                denoise = self._guided([pairs[i] for i in batch], *how)
                noise = partial(self._noise, shape, [seeds[i] for i in batch])
                x_T = self._start(noise, initial, levels)
                x = sample(denoise, x_T, levels, noise=noise, callback=report)
                samples |= zip(batch, zip(self._decode(x), _to_cpu(x), strict=True), strict=True)
        return [Sample(*samples[i], prompts[i], seeds[i]) for i in range(len(prompts))]

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(C, h, w) of the latents. Raises UserError for sides that the networks cannot downsample."""
        pixels = {"height": height, "width": width}
        pixels = {side: self.default_size if n is None else n for side, n in pixels.items()}
        unit = self.vae.factor * self.unet.factor
        for side, n in pixels.items():
            if n % unit or n < unit:
                below, above = n // unit * unit, (n // unit + 1) * unit
                valid = f"{below} or {above}" if below > 0 else above
                raise UserError(f"{side} {n} is not a multiple of {unit} pixels", remedy=f"Use {valid}.")
        return self.vae.embed_dim, *(n // self.vae.factor for n in pixels.values())

    def _levels(
        self, sampler: SamplerNode | Sampler, steps: int, spacing: Spacing | None, strength: float | None
    ) -> list[Level]:
        """Those of the steps and of the end; given a strength, of the last floor(steps * strength) steps."""
        levels = sampling_levels(self.process, sampler, steps=steps, spacing=spacing)
        if strength is None:
            return levels
        is_share = 0 <= strength <= 1
        kept = int(steps * strength) if is_share else 0
        if kept == 0:
            fault = f"leaves no step of {steps}" if is_share else "is not between 0 and 1"
            raise UserError(f"strength {strength} {fault}", remedy=f"Choose from {1 / steps:.2g} to 1.")
        return levels[-kept - 1 :]

    def negative(self, prompt: str | None) -> str | None:
        """The text of the unconditional prediction; None is SDXL's zeros, elsewhere the empty prompt."""
        return self.text_encoder.unconditional if prompt is None else prompt

    def _encodings(
        self, prompts: Sequence[str], negative: Sequence[str | None], batch_size: int, **how: Any
    ) -> list[tuple[TextEncoding, TextEncoding | None]]:
        """The encoding of each prompt, and of the negative prompt, if any, beside it: contexts [1, N M, D].

        negative: it alone, or nothing. how: as of `Conditioner.encode`. N is 1 or, `chunked`, as many chunks
        as the longer one has.
        """
        model, base = self.denoiser, self.guidance_base
        if not negative:
            own = model.encode(prompts, batch_size, **how)
            return [(own[prompt], None) for prompt in prompts]
        own = model.encode([*([] if base else negative), "", *prompts], batch_size, **how)
        others = base.encode([*negative, ""], batch_size, **how) if base else own
        fill = filler(own)
        fill_negative = filler(others) if base else fill
        tokens = {text: encoding.context.shape[1] for text, encoding in own.items()}
        least = others[negative[0]].context.shape[1]
        lengths = [max(tokens[prompt], least) for prompt in prompts]
        return [
            (fill(prompt, n), fill_negative(negative[0], n))
            for prompt, n in zip(prompts, lengths, strict=True)
        ]

    def _guided(
        self,
        pairs: Sequence[tuple[TextEncoding, TextEncoding | None]],
        levels: Sequence[Level],
        guidance_scale: float,
        batched: bool,
        sizes: Sizes | None,
    ) -> Denoise:
        """B pairs of encodings -> a denoiser of B latents at these levels, but for the end."""
        levels = levels[:-1]
        prompts, negative = map(list, zip(*pairs, strict=True))
        guide = partial(classifier_free_guidance, guidance_scale=guidance_scale, batched=batched)
        if negative[0] is None:
            denoise, numbers = self.denoiser.conditioned(prompts, levels, sizes)
            return guide(denoise, numbers, [])
        if self.guidance_base is None:
            denoise, numbers = self.denoiser.conditioned([*negative, *prompts], levels, sizes)
            return guide(denoise, numbers[len(pairs) :], numbers[: len(pairs)])
        base, unconditional = self.guidance_base.conditioned(negative, levels, sizes)
        denoise, numbers = self.denoiser.conditioned(prompts, levels, sizes)
        return guide(denoise, numbers, unconditional, base=base)

    def _posterior(self, image: Image.Image, shape: Sequence[int]) -> DiagonalGaussian:
        """The latents of an image, cropped and scaled to those of `shape`: mean and std [1, C, h, w]."""
        factor = self.vae.factor
        image = ImageOps.fit(image.convert("RGB"), (shape[2] * factor, shape[1] * factor), Image.LANCZOS)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0) / 127.5 - 1
        with vae_precision(self.unet, placement(self.vae)[0]):
            latent_stats = self.vae.encode(pixels.to(*placement(self.vae))).latent_stats.float()
        return DiagonalGaussian.from_latent_stats(latent_stats.to(placement(self.unet)[0]))

    def _start(
        self, noise: Callable[[str], Tensor], initial: DiagonalGaussian | None, levels: Sequence[Level]
    ) -> Tensor:
        """The sampler's start: noise, or a sample of the initial latents with that noise added."""
        x0 = None if initial is None else initial.sample(noise("init"))
        return self.process.start(noise("x_T"), levels[0], x0)

    def _noise(self, shape: Sequence[int], seeds: Sequence[int], purpose: str | int) -> Tensor:
        """ "x_T", "init" or a step's number -> [B, C, h, w] float32; every sample has its own seed."""
        purpose = f"step/{purpose}" if isinstance(purpose, int) else purpose
        noise = [randn(shape, seed=seed, items=[0], purpose=f"sample/{purpose}") for seed in seeds]
        return torch.cat(noise).to(placement(self.unet)[0])

    def _decode(self, latents: Tensor) -> list[Image.Image]:
        """[B, C, h, w] -> B images, decoded one by one: batches take more memory and hardly less time."""
        place = placement(self.vae)
        with vae_precision(self.unet, placement(self.vae)[0]):
            pixels = torch.cat([self.vae.decode(one.to(*place)).float() for one in latents.split(1)])
        if not pixels.isfinite().all():
            log.warning("An image has values that are not finite: try fp32 or bf16")
        levels = ((pixels.nan_to_num().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return [Image.fromarray(image.numpy()) for image in rearrange(levels, "b c h w -> b h w c").cpu()]

    @contextmanager
    def _eval(self, precision: Precision) -> Iterator[None]:
        """Eval mode and inference mode; afterwards every module has its own mode again."""
        networks = (self.vae, *self.denoiser.networks)
        base = self.guidance_base.networks if self.guidance_base else ()
        lower = autocast_for(precision, *networks, *base)
        with evaluating(*networks, *base), torch.inference_mode(), lower:
            yield


def _check_call(
    prompts: str | Sequence[str],
    seeds: Sequence[int] | None,
    *,
    sampler: SamplerNode | Sampler,
    eta: float,
    batch_size: int,
) -> tuple[Sequence[str], Sequence[int], Sampler]:
    """Prompts and seeds as they are meant, and the sampler.

    A string is one prompt for all seeds, which count from 0.
    """
    if isinstance(prompts, str):
        prompts = [prompts] * (1 if seeds is None else len(seeds))
    seeds = range(len(prompts)) if seeds is None else seeds
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts do not go with {len(seeds)} seeds")
    built, name = build_sampler(sampler), sampler_label(sampler)
    if eta != 0 and name != "ddim":
        raise UserError(f"The {name} sampler has no eta (it is {eta})", remedy="Set eta to 0 or use ddim.")
    if not 0 <= eta <= 1:
        raise UserError(f"eta {eta} is impossible", remedy="Choose from 0 to 1.")
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} is impossible", remedy="Choose 1 or more.")
    return prompts, seeds, partial(ddim, eta=eta) if name == "ddim" else built


@contextmanager
def _reporting(progress: bool | Callable[[int], object], images: int, *, steps: int) -> Iterator[Callback]:
    """A sampler's callback that reports its steps to the callable, or to a bar of images."""
    done = 0
    with tqdm(total=images, desc="images", unit="image", disable=progress is not True) as bar:

        def show(more: int) -> None:
            nonlocal done
            done += more
            bar.update(done // steps - bar.n)

        more = progress if callable(progress) else show
        yield lambda i, x: more(len(x))


def _batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of samples, in batches of contexts of equal length, so that no context needs padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    groups = [list(group) for _, group in groupby(order, key=lengths.__getitem__)]
    return [
        group[first : first + batch_size] for group in groups for first in range(0, len(group), batch_size)
    ]


def _to_cpu(x: Tensor) -> list[Tensor]:
    """B latents on the CPU, each with its own memory, as normal tensors, which training may use."""
    with torch.inference_mode(False):
        return [latents.clone() for latents in x.cpu()]
