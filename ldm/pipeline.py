"""Text2Image: prompts and seeds -> pictures. The one sampling path: previews, priors, scripts, evaluation.

A picture is a function of its own seed and prompt, whatever else is in the call and however it is batched.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ldm.checkpoints.layout import PREFIXES
from ldm.checkpoints.load import file_hash, load_parts, open_model, unfilled
from ldm.checkpoints.lora import merge_lora, read_lora
from ldm.config import instantiate
from ldm.diffusion.guidance import classifier_free_guidance
from ldm.diffusion.samplers import SAMPLERS, sampling_timesteps
from ldm.diffusion.schedule import check_parameterization, make_alphas_cumprod, to_eps
from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.text_encoder import CLIPTextEncoder
from ldm.models.unet import UNetModel
from ldm.randomness import randn

log = logging.getLogger(__name__)

SCHEDULE = ("beta_schedule", "linear_start", "linear_end", "timesteps")


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
    ) -> "Text2Image":
        """From a Stable Diffusion file, or a folder as diffusers saves it.

        config: with a `model` section, or the params of one; None takes what the file says of itself.
        loras: files, each with the weight at which it is merged into the networks.
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
        batch_size: int = 8,
        batched_guidance: bool = True,
        progress: bool | Callable[[int], object] = False,
    ) -> list[Sample]:
        """One picture for each prompt and its seed, `batch_size` at a time.

        `progress` True shows a bar; a callable hears of n more steps, of len(prompts) * steps in all.
        """
        _check(prompts, seeds, sampler=sampler, batch_size=batch_size)
        shape = self.latent_shape(height, width)
        timesteps = sampling_timesteps(steps, T=len(self.alphas_cumprod))
        samples = []
        with self._drawing(), tqdm(total=len(prompts) * steps, disable=progress is not True) as bar:
            more = progress if callable(progress) else bar.update
            contexts = self._encode([negative_prompt, *prompts], batch_size)
            unconditional = contexts[negative_prompt].unsqueeze(0)
            for first in range(0, len(prompts), batch_size):
                batch = slice(first, first + batch_size)
                context = torch.stack([contexts[prompt] for prompt in prompts[batch]])
                predict = classifier_free_guidance(
                    self._predict_eps, context, unconditional, guidance_scale, batched=batched_guidance
                )
                noise = partial(self._noise, shape, seeds[batch])
                options = {"eta": eta, "noise": noise, "callback": lambda i, x: more(len(x))}
                x = SAMPLERS[sampler](predict, noise("x_T"), timesteps, self.alphas_cumprod, **options)
                samples += map(Sample, self._decode(x), _outside(x), prompts[batch], seeds[batch])
        return samples

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

    def _encode(self, texts: Sequence[str], batch_size: int) -> dict[str, Tensor]:
        """Each different text once -> its context [M, D], where and as the UNet wants it."""
        unique, contexts = list(dict.fromkeys(texts)), {}
        for text in unique:
            cut = None if text in self._warned else self.cond_stage.overlong(text)
            if cut is not None:
                self._warned.add(text)
                log.warning("Only %d tokens fit: %r of %r is cut off", self.cond_stage.max_length, cut, text)
        for first in range(0, len(unique), batch_size):
            batch = unique[first : first + batch_size]
            ids = self.cond_stage.tokenize(batch).to(_place(self.cond_stage)[0])
            contexts |= zip(batch, self.cond_stage(ids).to(*_place(self.unet)), strict=True)
        return contexts

    def _noise(self, shape: Sequence[int], seeds: Sequence[int], purpose: str | int) -> Tensor:
        """ "x_T" or a step's number -> [B, C, h, w] float32; every picture has its own seed."""
        purpose = purpose if purpose == "x_T" else f"step/{purpose}"
        draws = [randn(shape, seed=seed, items=[0], purpose=f"sample/{purpose}") for seed in seeds]
        return torch.cat(draws).to(_place(self.unet)[0])

    def _predict_eps(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """The network in its own precision, everything around it in float32."""
        prediction = self.unet(x.to(context.dtype), t, context).float()
        return to_eps(self.parameterization, prediction, x, t, self.alphas_cumprod.to(x.device))

    def _decode(self, latents: Tensor) -> list[Image.Image]:
        """[B, C, h, w] -> B pictures."""
        pixels = self.first_stage.decode(latents.to(*_place(self.first_stage))).float()  # [B, 3, H, W]
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
        raise UserError(f"The sampler {sampler!r} is unknown", remedy=f"Choose {' or '.join(SAMPLERS)}.")
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} is impossible", remedy="Choose 1 or more.")


def _place(network: nn.Module) -> tuple[torch.device, torch.dtype]:
    parameter = next(network.parameters())
    return parameter.device, parameter.dtype


def _outside(x: Tensor) -> list[Tensor]:
    """B latents on the CPU, each in memory of its own; training may not use what inference mode made."""
    with torch.inference_mode(False):
        return [latents.clone() for latents in x.cpu()]
