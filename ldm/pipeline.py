"""Text2Image: prompts and seeds -> pictures. The one sampling path: previews, priors, scripts, evaluation.

A picture is a function of its own seed and prompt, whatever else is in the call and however it is batched.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

from ldm.checkpoints.embedding import EMBEDDING, read_embedding
from ldm.checkpoints.layout import PREFIXES
from ldm.checkpoints.load import file_hash, load_parts, open_model, unfilled
from ldm.checkpoints.lora import merge_lora, read_lora
from ldm.config import instantiate
from ldm.diffusion.guidance import ConditionalPredict, classifier_free_guidance
from ldm.diffusion.samplers import SAMPLERS, sampling_timesteps
from ldm.diffusion.schedule import (
    add_noise,
    check_parameterization,
    ends_in_noise,
    make_alphas_cumprod,
    to_eps,
)
from ldm.errors import UserError
from ldm.models.attention import repeat_rows
from ldm.models.autoencoder import AutoencoderKL, DiagonalGaussian
from ldm.models.text_encoder import CLIPTextEncoder
from ldm.models.unet import UNetModel
from ldm.randomness import randn

log = logging.getLogger(__name__)

SCHEDULE = ("beta_schedule", "linear_start", "linear_end", "timesteps", "zero_terminal_snr")


class Sample(NamedTuple):
    image: Image.Image
    latents: Tensor  # [C, h, w] float32 on the CPU, straight from the sampler
    prompt: str
    seed: int


class Text2Image:
    """Draws with networks as they are: each keeps its device and dtype, and may be in training meanwhile.

    alphas_cumprod: [T]. default_size: pixels a side of pictures whose height or width isn't given.
    model_hash: sha256 of the file the weights came from, if they came from one.
    """

    def __init__(
        self,
        unet: UNetModel,
        first_stage: AutoencoderKL,
        cond_stage: CLIPTextEncoder,
        *,
        alphas_cumprod: Tensor,
        parameterization: str = "eps",
        default_size: int = 512,
        model_hash: str | None = None,
    ):
        check_parameterization(parameterization)
        self.unet, self.first_stage, self.cond_stage = unet, first_stage, cond_stage
        self.alphas_cumprod, self.parameterization = alphas_cumprod, parameterization
        self.default_size, self.model_hash = default_size, model_hash
        self._warned: set[str] = set()  # overlong prompts

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
    ) -> "Text2Image":
        """From a Stable Diffusion file, or a folder as diffusers saves it.

        config: with a `model` section, or the params of one; None takes what the file says of itself.
        loras: files, each with the weight at which it is merged into the networks.
        embeddings: textual-inversion files, whose words prompts may hold; that of a run is beside its model.
        """
        _check_device(device)
        model = open_model(path)
        params = _model_params(config, where=path) if config is not None else model.config
        parameterization = params.get("parameterization", "eps")
        with unfilled():
            networks = {part: instantiate(params[f"{part}_config"]).to(dtype) for part in PREFIXES}
        parts = model.parts
        for file, weight in loras:
            parts = merge_lora(parts, read_lora(file, parts), weight=weight)
        load_parts(networks, parts, where=path, device=device)
        if model.tokenizer is not None and config is None:
            networks["cond_stage"].tokenizer_name = str(model.tokenizer)
        for file in [*_own_embedding(Path(path)), *embeddings]:
            for word, vectors in read_embedding(file).items():
                networks["cond_stage"].add_word(word, vectors)
        return cls(
            **{part: network.eval().to(device).requires_grad_(False) for part, network in networks.items()},
            alphas_cumprod=make_alphas_cumprod(**{key: params[key] for key in SCHEDULE if key in params}),
            parameterization=parameterization,
            default_size=model.size(parameterization),
            model_hash=file_hash(path),
        )

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        negative_prompt: str = "",
        steps: int = 50,
        guidance_scale: float = 7.5,
        eta: float = 0.0,
        sampler: str = "ddim",
        height: int | None = None,
        width: int | None = None,
        init_image: Image.Image | None = None,
        strength: float = 0.75,
        long_prompts: bool = False,
        batch_size: int = 8,
        batched_guidance: bool = True,
        progress: bool | Callable[[int], object] = False,
    ) -> list[Sample]:
        """One picture for each prompt and its seed, `batch_size` at a time.

        `init_image`, cropped to the shape, is drawn over in the last `strength` of the steps. `long_prompts`
        are encoded whole, in chunks. `progress` True shows a bar; a callable hears of n more steps.
        """
        _check(prompts, seeds, sampler=sampler, batch_size=batch_size)
        shape, samples = self.latent_shape(height, width), {}
        timesteps = self._timesteps(steps, None if init_image is None else strength)
        with self._drawing(), tqdm(total=len(prompts) * len(timesteps), disable=progress is not True) as bar:
            guide = partial(classifier_free_guidance, guidance_scale=guidance_scale, batched=batched_guidance)
            more = progress if callable(progress) else bar.update
            how = {"eta": eta, "callback": lambda i, x: more(len(x)), "alphas_cumprod": self.alphas_cumprod}
            pairs = self._contexts(prompts, negative_prompt, batch_size, chunked=long_prompts)
            initial = None if init_image is None else self._posterior(init_image, shape)
            for batch in _batches([len(context) for context, _ in pairs], batch_size):
                predict = guide(*self._conditional([pairs[i] for i in batch]))
                noise = partial(self._noise, shape, [seeds[i] for i in batch])
                x = self._start(noise, initial, timesteps)
                x = SAMPLERS[sampler](predict, x, timesteps, noise=noise, **how)
                samples |= zip(batch, zip(self._decode(x), _outside(x), strict=True), strict=True)
        return [Sample(*samples[i], prompts[i], seeds[i]) for i in range(len(prompts))]

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(C, h, w) for pixels; both networks must be able to halve them as often as they do."""
        pixels = {"height": height, "width": width}
        pixels = {side: self.default_size if n is None else n for side, n in pixels.items()}
        unit = self.first_stage.factor * self.unet.factor
        for side, n in pixels.items():
            if n % unit or n < unit:
                below, above = n // unit * unit, (n // unit + 1) * unit
                valid = f"{below} or {above}" if below > 0 else above
                raise UserError(f"{side} {n} is no multiple of {unit} pixels", remedy=f"Use {valid}.")
        return self.first_stage.embed_dim, *(n // self.first_stage.factor for n in pixels.values())

    def _timesteps(self, steps: int, strength: float | None) -> Tensor:
        """Descending [S]; given a strength, the last that share of them, as many whole ones as that is."""
        spacing = "trailing" if ends_in_noise(self.alphas_cumprod) else "leading"
        timesteps = sampling_timesteps(steps, T=len(self.alphas_cumprod), spacing=spacing)
        if strength is None:
            return timesteps
        kept = int(steps * strength) if 0 <= strength <= 1 else 0
        if kept == 0:
            what = f"strength {strength} leaves no step of {steps} to draw"
            raise UserError(what, remedy=f"Choose from {1 / steps:.2g} to 1.")
        return timesteps[-kept:]

    def _contexts(
        self, prompts: Sequence[str], negative_prompt: str, batch_size: int, *, chunked: bool
    ) -> list[tuple[Tensor, Tensor]]:
        """The context of each prompt, and of the negative prompt beside it, both [N M, D].

        N is 1 or, `chunked`, as many chunks as the longer one has; the shorter one is filled up with empty
        ones, as AUTOMATIC1111 does.
        """
        contexts = self._encode([negative_prompt, "", *prompts], batch_size, chunked=chunked)

        @cache
        def filled(text: str, length: int) -> Tensor:
            missing = (length - len(contexts[text])) // len(contexts[""])
            return torch.cat([contexts[text], *[contexts[""]] * missing])

        pairs = [(prompt, negative_prompt) for prompt in prompts]
        lengths = [max(len(contexts[text]) for text in pair) for pair in pairs]
        return [tuple(filled(text, n) for text in pair) for pair, n in zip(pairs, lengths, strict=True)]

    def _encode(self, texts: Sequence[str], batch_size: int, *, chunked: bool) -> dict[str, Tensor]:
        """Each different text once -> its context [N M, D], where and as the UNet wants it; N chunks or 1."""
        unique, tower = list(dict.fromkeys(texts)), self.cond_stage
        for text in [] if chunked else unique:
            cut = None if text in self._warned else tower.overlong(text)
            if cut is not None:
                self._warned.add(text)
                log.warning("Only %d tokens fit: %r of %r is cut off", tower.max_length, cut, text)
        ids = [tower.tokenize_chunks(text) if chunked else tower.tokenize([text]) for text in unique]
        batches = torch.cat(ids).to(_place(tower)[0]).split(batch_size)
        rows = torch.cat([tower(batch).to(*_place(self.unet)) for batch in batches])
        chunks = rows.split([len(own) for own in ids])
        return {text: own.flatten(0, 1) for text, own in zip(unique, chunks, strict=True)}

    def _posterior(self, image: Image.Image, shape: Sequence[int]) -> DiagonalGaussian:
        """The latents of a picture, cropped and scaled to those of `shape`: mean and std [1, C, h, w]."""
        factor = self.first_stage.factor
        image = ImageOps.fit(image.convert("RGB"), (shape[2] * factor, shape[1] * factor), Image.LANCZOS)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0) / 127.5 - 1
        moments = self.first_stage.encode(pixels.to(*_place(self.first_stage))).moments.float()
        return DiagonalGaussian.from_moments(moments.to(_place(self.unet)[0]))

    def _start(
        self, noise: Callable[[str], Tensor], initial: DiagonalGaussian | None, timesteps: Tensor
    ) -> Tensor:
        """Where the sampler sets out: noise, or a draw of the initial latents with that noise added."""
        x_T = noise("x_T")
        if initial is None:
            return x_T
        t = timesteps[:1].to(x_T.device).expand(len(x_T))
        return add_noise(initial.sample(noise("init")), x_T, t, self.alphas_cumprod.to(x_T.device))

    def _noise(self, shape: Sequence[int], seeds: Sequence[int], purpose: str | int) -> Tensor:
        """ "x_T", "init" or a step's number -> [B, C, h, w] float32; every picture has its own seed."""
        purpose = f"step/{purpose}" if isinstance(purpose, int) else purpose
        draws = [randn(shape, seed=seed, items=[0], purpose=f"sample/{purpose}") for seed in seeds]
        return torch.cat(draws).to(_place(self.unet)[0])

    def _conditional(
        self, pairs: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[ConditionalPredict, list[int], list[int]]:
        """B pairs of contexts [M, D] -> eps by the numbers of prompts, and the B numbers of either side.

        A tensor that several pairs hold goes through the network once.
        """
        order = [*(unconditional for _, unconditional in pairs), *(context for context, _ in pairs)]
        unique = list({id(context): context for context in order}.values())
        number = {id(context): i for i, context in enumerate(unique)}
        numbers = [[number[id(pair[side])] for pair in pairs] for side in (0, 1)]
        return partial(self._predict_eps, torch.stack(unique)), *numbers

    def _predict_eps(self, contexts: Tensor, x: Tensor, t: Tensor, rows: Sequence[int]) -> Tensor:
        """The network in its own precision, everything around it in float32."""
        prediction = self.unet.predict(x, t, contexts, rows).float()
        x, t = repeat_rows(x, len(rows)), repeat_rows(t, len(rows))
        return to_eps(self.parameterization, prediction, x, t, self.alphas_cumprod.to(x.device))

    def _decode(self, latents: Tensor) -> list[Image.Image]:
        """[B, C, h, w] -> B pictures, one at a time: more at once take more memory and no less time."""
        place = _place(self.first_stage)
        pixels = torch.cat([self.first_stage.decode(one.to(*place)).float() for one in latents.split(1)])
        if not pixels.isfinite().all():
            log.warning("A picture has values that are not finite: try fp32 or bf16")
        levels = ((pixels.nan_to_num().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return [Image.fromarray(picture.numpy()) for picture in rearrange(levels, "b c h w -> b h w c").cpu()]

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """Networks in eval mode, nothing cast or recorded; afterwards every module is in its mode again."""
        networks = (self.unet, self.first_stage, self.cond_stage)
        modes = [(module, module.training) for network in networks for module in network.modules()]
        autocast = torch.autocast(_place(self.unet)[0].type, enabled=False)  # a training run may be in one
        try:
            for network in networks:
                network.eval()
            with torch.inference_mode(), autocast:
                yield
        finally:
            for module, training in modes:
                module.training = training


def find_model(path: Path | None = None) -> Path:
    """The model file of a run folder, a file as it is, or by default the newest run's under logs/."""
    if path is not None:
        return path / "model.safetensors" if (path / "model.safetensors").exists() else path
    runs = sorted(Path("logs").glob("*/model.safetensors"), key=lambda file: file.stat().st_mtime)
    if not runs:
        raise UserError("There is no finished run under logs/", remedy="Name a file or a run with --model.")
    return runs[-1]


def _own_embedding(path: Path) -> list[Path]:
    """The words that a run learned, beside its model file."""
    file = path.with_name(EMBEDDING)
    return [file] if path.name == "model.safetensors" and file.is_file() else []


def _model_params(config: Mapping[str, Any], *, where: object) -> Mapping[str, Any]:
    """Params of a config's model section, which must describe the networks."""
    params = config["model"].get("params", {}) if "model" in config else config
    missing = [key for key in (f"{part}_config" for part in PREFIXES) if key not in params]
    if missing:
        raise UserError(f"The model section of the config lacks {', '.join(missing)}", where=where)
    return params


def _check_device(device: str | torch.device) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # unknown, not built in, or not there
        reason = str(error).splitlines()[0]
        raise UserError(f"The device {device} cannot be used: {reason}", remedy="Try cpu.") from error


def _check(prompts: Sequence[str], seeds: Sequence[int], *, sampler: str, batch_size: int) -> None:
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts do not go with {len(seeds)} seeds")
    if sampler not in SAMPLERS:
        *others, last = SAMPLERS
        remedy = f"Choose {', '.join(others)} or {last}."
        raise UserError(f"The sampler {sampler!r} is unknown", remedy=remedy)
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} is impossible", remedy="Choose 1 or more.")


def _batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Numbers of pictures, in batches of contexts of one length: so each is as it would be alone."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    groups = [list(group) for _, group in groupby(order, key=lengths.__getitem__)]
    return [
        group[first : first + batch_size] for group in groups for first in range(0, len(group), batch_size)
    ]


def _place(network: nn.Module) -> tuple[torch.device, torch.dtype]:
    parameter = next(network.parameters())
    return parameter.device, parameter.dtype


def _outside(x: Tensor) -> list[Tensor]:
    """B latents on the CPU, each in memory of its own; training may not use what inference mode made."""
    with torch.inference_mode(False):
        return [latents.clone() for latents in x.cpu()]
