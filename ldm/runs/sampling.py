"""Sampling in a training run: its prior images, its previews and its final samples."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.conditioner import clip_skip_of, padding_of
from ldm.data.buckets import Shape
from ldm.data.dreambooth import DreamBoothDataModule
from ldm.data.priors import GenerateImages, PriorSet, PriorSpec
from ldm.denoiser import Denoiser
from ldm.diffusion.process import NoiseProcess
from ldm.engine import distributed
from ldm.engine.device import temporarily_on
from ldm.pipeline import Text2Image
from ldm.precision import resolve_precision
from ldm.sampler_nodes import levels_hash, usual_spacing
from ldm.schema import PriorsConfig, SamplesConfig
from ldm.training.latent_diffusion import LatentDiffusion
from ldm.training.techniques import frozen_copy

GeneratedImages = Callable[..., list[Any]]  # prompts, seeds and how they are sampled -> an item for each


def text2image(module: LatentDiffusion, *, size: int, guidance_base: Denoiser | None = None) -> Text2Image:
    """The sampling pipeline over the live networks of a run."""
    return Text2Image(
        **module.networks,
        process=module.process,
        default_size=size,
        guidance_base=guidance_base,
    )


def base_denoiser(module: LatentDiffusion) -> Denoiser:
    """The base model of a run, unchanged by training; call this before training starts.

    With LoRA these are the live networks with the LoRA off, otherwise copies of them.
    """
    unet, text_encoder = module.networks["unet"], module.networks["text_encoder"]
    without = [] if module.lora is None else [module.lora]
    if module.lora is None:
        unet, text_encoder = frozen_copy(unet), frozen_copy(text_encoder)
    return Denoiser(unet, text_encoder, process=module.process, without=without)


def prior_set(
    prompt: str,
    config: PriorsConfig,
    *,
    shape: Shape,
    base_sha256: str,
    process: NoiseProcess,
    device: torch.device,
    unconditional: str | None = "",
    **networks: Any,
) -> PriorSet:
    """The set that is named by these settings, this base, its noise process and the precision on the device.

    prompt: of the class. unconditional: what no negative prompt is, see `CLIPTextEncoder.unconditional`.
    networks: what else `PriorSpec` says of them, where it is not usual.
    """
    spec = PriorSpec(
        prompt=prompt,
        base_sha256=base_sha256,
        sampler=config.sampler,
        spacing=None if config.spacing == usual_spacing(config.sampler) else config.spacing,
        steps=config.steps,
        guidance_scale=config.guidance_scale,
        negative_prompt=unconditional if config.negative_prompt is None else config.negative_prompt,
        size=shape.height,
        seed=config.seed,
        precision=resolve_precision(config.precision, device),
        width=None if shape.is_square else shape.width,
        levels=levels_hash(process, config.sampler, steps=config.steps, spacing=config.spacing),
        **networks,
    )
    return PriorSet(Path(config.folder), spec)


def prior_sets(
    module: LatentDiffusion, data: DreamBoothDataModule, config: PriorsConfig, *, base_sha256: str
) -> list[PriorSet]:
    """The sets of a run, of each class whose images the base generates one for each bucket."""
    text, weight = module.cond_stage_model, next(module.networks["unet"].parameters())
    about = {"base_sha256": base_sha256, "process": module.process, "device": module.device}
    about |= {"unconditional": text.unconditional, "clip_skip": clip_skip_of(text)}
    about |= {"padding": padding_of(text), "weights": str(weight.dtype).removeprefix("torch.")}
    return [
        prior_set(known.prompt, config, shape=shape, **about)
        for known in data.generated_classes
        for shape in data.buckets_in_use.shapes
    ]


def prior_generator(spec: PriorSpec, pipeline: Text2Image, *, batch_size: int) -> GenerateImages:
    """-> the function that generates images of a set with the networks of `pipeline`."""

    def generate(seeds: Sequence[int]) -> list[tuple[Image.Image, Tensor]]:
        with temporarily_on(pipeline.vae, next(pipeline.unet.parameters()).device):
            samples = pipeline(
                [spec.prompt] * len(seeds),
                seeds=seeds,
                sampler=spec.sampler,
                spacing=spec.spacing,
                steps=spec.steps,
                guidance_scale=spec.guidance_scale,
                negative_prompt=spec.negative_prompt,
                batch_size=batch_size,
                precision=spec.precision,
                clip_skip=spec.clip_skip,
                height=spec.shape.height,
                width=spec.shape.width,
            )
        return [(sample.image, sample.latents) for sample in samples]

    return generate


def frozen(pipeline: Text2Image) -> Text2Image:
    """A pipeline with frozen copies of the UNet and text encoder, which training does not change."""
    return Text2Image(
        unet=frozen_copy(pipeline.unet),
        text_encoder=frozen_copy(pipeline.text_encoder),
        vae=pipeline.vae,
        process=pipeline.process,
        default_size=pipeline.default_size,
    )


def generate_priors(pipeline: Text2Image, priors: PriorSet, count: int, *, batch_size: int) -> int:
    """Generates the missing prior images, divided among the processes -> how many were missing."""
    counts = distributed.all_gather_object(len(priors.missing(count)))  # other runs may write meanwhile
    missing = max(counts)
    if missing == 0:
        if distributed.rank() == 0 and not priors.is_listed(count):
            priors.write_manifest(count)
        return 0
    generate = prior_generator(priors.spec, pipeline, batch_size=batch_size)
    rank, world_size = distributed.rank(), distributed.world_size()
    with tqdm(total=missing, desc="prior images", unit="image", disable=rank > 0) as bar:
        priors.generate_missing(
            count,
            generate,
            batch_size=batch_size,
            progress=lambda n: bar.update(n * world_size),
            rank=rank,
            world_size=world_size,
        )
    distributed.barrier()
    if rank == 0:
        priors.write_manifest(count)
    return missing


def in_shapes(pipeline: GeneratedImages, shapes: Sequence[Shape]) -> GeneratedImages:
    """A pipeline whose images have these shapes in turn, those of seed s number s modulo their count.

    Images for which the call gives a side keep what it gives; without shapes it is the pipeline itself.
    """
    if not shapes:
        return pipeline

    def generate(prompts: Sequence[str], *, seeds: Sequence[int], **how: Any) -> list[Any]:
        if (how.get("height"), how.get("width")) != (None, None):
            return pipeline(prompts, seeds=seeds, **how)
        found: dict[int, Any] = {}
        for k, shape in enumerate(shapes):
            own = [i for i, seed in enumerate(seeds) if seed % len(shapes) == k]
            sides = {"height": shape.height, "width": shape.width}
            few = [prompts[i] for i in own], [seeds[i] for i in own]
            found |= zip(own, pipeline(few[0], seeds=few[1], **how | sides), strict=True) if own else ()
        return [found[i] for i in range(len(seeds))]

    return generate


def generate_samples(
    pipeline: Text2Image,
    config: SamplesConfig,
    prompts: Sequence[str],
    *,
    shapes: Sequence[Shape] = (),
    progress: bool = False,
) -> list[tuple[str, list[Image.Image]]]:
    """`n` images of each prompt from fixed seeds, see `in_shapes` -> (prompt, images) rows."""
    jobs = [(prompt, config.seed + i) for prompt in prompts for i in range(config.n)]
    samples = in_shapes(pipeline, shapes)(
        [prompt for prompt, _ in jobs],
        seeds=[seed for _, seed in jobs],
        sampler=config.sampler,
        spacing=config.spacing,
        steps=config.steps,
        guidance_scale=config.guidance_scale,
        negative_prompt=config.negative_prompt,
        batch_size=config.batch_size,
        precision=config.precision,
        height=config.height,
        width=config.width,
        progress=progress,
    )
    images = [sample.image for sample in samples]
    return [(prompt, images[k * config.n : (k + 1) * config.n]) for k, prompt in enumerate(prompts)]
