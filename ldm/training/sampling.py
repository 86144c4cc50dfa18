"""Pictures drawn by a training run: its prior images, its previews and its final samples."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.data.dreambooth import DreamBoothDataModule
from ldm.data.priors import Draw, PriorSet, PriorSpec
from ldm.denoiser import Denoiser
from ldm.diffusion.samplers import SamplerName
from ldm.pipeline import Text2Image
from ldm.precision import Precision, resolve_precision
from ldm.training import ranks
from ldm.training.device import placed
from ldm.training.latent_diffusion import LatentDiffusion


@dataclass(frozen=True)
class PriorDrawing:
    """How the base model draws prior images, and the folder that keeps the sets.

    precision: of the networks; "auto" is bf16 on a CUDA device and fp32 elsewhere.
    """

    folder: str = "priors"
    sampler: SamplerName = "ddim"
    steps: int = 50
    guidance_scale: float = 7.5
    negative_prompt: str = ""
    seed: int = 0
    batch_size: int = 16
    precision: Precision = "auto"


@dataclass(frozen=True)
class SampleDrawing:
    """What a run draws to be looked at: `n` pictures of each prompt, with {identifier} and {class_word}.

    precision: as that of prior images.
    """

    prompts: Sequence[str] = field(default_factory=list)
    n: int = 4
    sampler: SamplerName = "ddim"
    steps: int = 50
    guidance_scale: float = 7.5
    negative_prompt: str = ""
    guidance_base: bool = False  # whether the base predicts for the negative prompt, not the trained model
    seed: int = 23
    batch_size: int = 16
    precision: Precision = "auto"
    every_steps: int = 0  # optimizer steps between previews; 0 draws none
    preview_n: int = 2  # pictures of each prompt in a preview


def text2image(module: LatentDiffusion, *, size: int, guidance_base: Denoiser | None = None) -> Text2Image:
    """The sampling path over the live networks of a run."""
    return Text2Image(
        **module.networks,
        alphas_cumprod=module.alphas_cumprod,
        parameterization=module.parameterization,
        default_size=size,
        guidance_base=guidance_base,
    )


def base_denoiser(module: LatentDiffusion) -> Denoiser:
    """The base that a run sets out from, whatever it learns later; to be made before it trains.

    Where a LoRA learns, these are the live networks without its factors; else copies of them.
    """
    unet, cond_stage = module.networks["unet"], module.networks["cond_stage"]
    without = [] if module.lora is None else [module.lora]
    if module.lora is None:
        unet, cond_stage = (copy.deepcopy(n).eval().requires_grad_(False) for n in (unet, cond_stage))
    return Denoiser(
        unet,
        cond_stage,
        alphas_cumprod=module.alphas_cumprod.clone(),
        parameterization=module.parameterization,
        without=without,
    )


def prior_set(
    data: DreamBoothDataModule, drawing: PriorDrawing, *, base_sha256: str, device: torch.device
) -> PriorSet:
    """The set that these settings, this base and the precision of the device name; others are another set."""
    spec = PriorSpec(
        prompt=data.prior_prompt,
        base_sha256=base_sha256,
        sampler=drawing.sampler,
        steps=drawing.steps,
        guidance_scale=drawing.guidance_scale,
        negative_prompt=drawing.negative_prompt,
        size=data.size,
        seed=drawing.seed,
        precision=resolve_precision(drawing.precision, device),
    )
    return PriorSet(Path(drawing.folder), spec)


def drawing_of(spec: PriorSpec, draw: Text2Image, *, batch_size: int) -> Draw:
    """How a set's images are drawn, by the networks of `draw`."""

    def pictures(seeds: Sequence[int]) -> list[tuple[Image.Image, Tensor]]:
        with placed(draw.first_stage, next(draw.unet.parameters()).device):
            samples = draw(
                [spec.prompt] * len(seeds),
                seeds=seeds,
                sampler=spec.sampler,
                steps=spec.steps,
                guidance_scale=spec.guidance_scale,
                negative_prompt=spec.negative_prompt,
                batch_size=batch_size,
                precision=spec.precision,
            )
        return [(sample.image, sample.latents) for sample in samples]

    return pictures


def frozen(draw: Text2Image) -> Text2Image:
    """The same way to draw, with copies of the UNet and text encoder that training does not change."""
    copies = {name: copy.deepcopy(getattr(draw, name)) for name in ("unet", "cond_stage")}
    return Text2Image(
        **{name: network.eval().requires_grad_(False) for name, network in copies.items()},
        first_stage=draw.first_stage,
        alphas_cumprod=draw.alphas_cumprod.clone(),
        parameterization=draw.parameterization,
        default_size=draw.default_size,
    )


def draw_priors(draw: Text2Image, priors: PriorSet, count: int, *, batch_size: int) -> int:
    """Draws the prior images that are missing, shared among the processes, resumable -> how many were."""
    missing = len(priors.missing(count))
    ranks.wait()  # until all have counted
    if missing == 0:
        return 0
    pictures = drawing_of(priors.spec, draw, batch_size=batch_size)
    rank, world_size = ranks.rank(), ranks.world_size()
    with tqdm(total=missing, desc="Drawing prior images", unit="image", disable=rank > 0) as bar:
        priors.generate_missing(
            count,
            pictures,
            batch_size=batch_size,
            progress=lambda n: bar.update(n * world_size),
            rank=rank,
            world_size=world_size,
        )
    ranks.wait()
    if rank == 0:
        priors.write_manifest(count)
    return missing


def draw_samples(
    draw: Text2Image, drawing: SampleDrawing, prompts: Sequence[str], *, progress: bool = False
) -> list[tuple[str, list[Image.Image]]]:
    """`n` pictures of each prompt from seeds that never change -> (prompt, pictures) rows."""
    jobs = [(prompt, drawing.seed + i) for prompt in prompts for i in range(drawing.n)]
    samples = draw(
        [prompt for prompt, _ in jobs],
        seeds=[seed for _, seed in jobs],
        sampler=drawing.sampler,
        steps=drawing.steps,
        guidance_scale=drawing.guidance_scale,
        negative_prompt=drawing.negative_prompt,
        batch_size=drawing.batch_size,
        precision=drawing.precision,
        progress=progress,
    )
    images = [sample.image for sample in samples]
    return [(prompt, images[k * drawing.n : (k + 1) * drawing.n]) for k, prompt in enumerate(prompts)]
