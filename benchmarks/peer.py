"""diffusers, from its public API: as its users run it ("script"), and its networks at their best ("best").

script: a step of its train_dreambooth.py with the flags that make it quickest (no gradients kept at zero,
text embedded beforehand where the text encoder is frozen, gradient checkpointing where we compute again), and
its pipeline as `from_pretrained` gives it. Every step encodes the images: the script cannot cache latents.
best: the same networks in a loop that somebody who times it would write: latents encoded beforehand, fused
AdamW, channels-last, no loss read in a step; and the pipeline in channels-last, by the same sampler.
Neither has a safety checker, which a released pipeline runs on every image.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from benchmarks.cases import LORA_RANK, PRIOR, SUBJECT, Case, pixels
from benchmarks.timing import Answer, serve


def load(folder: Path, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    for network in (pipe.unet, pipe.text_encoder, pipe.vae):
        _own(network)
    return pipe


def _own(network: torch.nn.Module) -> None:
    """Puts weights in memory of their own: pages of the file that they are mapped from would count too."""
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = tensor.data.clone()


class Training:
    def __init__(self, case: Case, folder: Path, *, device: str, best: bool, compiled: bool = False):
        pipe, frozen = load(folder), torch.bfloat16 if device == "cuda" else torch.float32
        self.case = case
        self.device = device
        self.frozen = frozen
        self.best = best
        self.unet, self.text, self.vae = pipe.unet.to(device), pipe.text_encoder, pipe.vae.to(device, frozen)
        self.vae.requires_grad_(False)
        self.text.requires_grad_(case.text).to(device, torch.float32 if case.text else frozen)
        if case.lora:
            self._add_lora()
        self._choose_ways(compiled)
        self.noises = DDPMScheduler.from_config(pipe.scheduler.config)
        half, side = case.batch // 2, pixels(case.size)
        captions = [SUBJECT] * half + [PRIOR] * half
        words = pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        self.ids = words.input_ids.to(device)
        self.pixels = torch.rand(case.batch, 3, side, side) * 2 - 1
        self.scale = self.vae.config.scaling_factor
        with torch.no_grad():
            self.context = None if case.text else self.text(self.ids)[0]
            if best:
                self.posterior = self.vae.encode(self.pixels.to(device, frozen)).latent_dist
                del self.vae
        if self.context is not None:
            del self.text
        learning = [*self.unet.parameters(), *(self.text.parameters() if case.text else ())]
        self.learning = [p for p in learning if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learning, lr=1e-6, fused=best or None)

    def _add_lora(self) -> None:
        self.unet.requires_grad_(False).to(self.frozen)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        self.unet.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=targets))
        for parameter in self.unet.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def _choose_ways(self, compiled: bool) -> None:
        if self.case.lean:
            self.unet.enable_gradient_checkpointing()
            if self.case.text:
                self.text.gradient_checkpointing_enable()
        self.unet.train()
        self.text.train(self.case.text)
        if self.best:
            self.unet.to(memory_format=torch.channels_last)
        if compiled:
            self.unet.compile()

    def _latents(self) -> Tensor:
        if self.best:
            return self.posterior.sample() * self.scale
        return self.vae.encode(self.pixels.to(self.device, self.frozen)).latent_dist.sample() * self.scale

    def step(self) -> None:
        latents = self._latents()
        noise = torch.randn_like(latents)
        t = torch.randint(self.noises.config.num_train_timesteps, (len(latents),), device=self.device)
        noisy = self.noises.add_noise(latents, noise, t)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device == "cuda"):
            context = self.text(self.ids)[0] if self.case.text else self.context
            prediction = self.unet(noisy, t, context, return_dict=False)[0].float()
        velocity = self.noises.config.prediction_type == "v_prediction"
        target = self.noises.get_velocity(latents, noise, t) if velocity else noise
        (ours, priors), (target, prior_target) = prediction.chunk(2), target.float().chunk(2)
        loss = F.mse_loss(ours, target) + F.mse_loss(priors, prior_target)
        loss.backward()
        clip_grad_norm_(self.learning, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not self.best:
            loss.detach().item()  # for its progress bar

    def serve(self, counts: Iterator[int], answer: Answer) -> None:
        serve(self.step, counts, answer, device=self.device)


class Sampling:
    def __init__(self, case: Case, folder: Path, *, device: str, best: bool):
        self.pipe = load(folder, torch.bfloat16 if device == "cuda" else torch.float32).to(device)
        self.pipe.scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        self.case = case
        self.device = device
        if best:
            self.pipe.unet.to(memory_format=torch.channels_last)
            self.pipe.vae.to(memory_format=torch.channels_last)

    def step(self) -> None:
        seeds = [torch.Generator(self.device).manual_seed(k) for k in range(self.case.batch)]
        side = pixels(self.case.size)
        self.pipe(
            [SUBJECT] * self.case.batch,
            num_inference_steps=self.case.steps,
            generator=seeds,
            height=side,
            width=side,
        )

    def serve(self, counts: Iterator[int], answer: Answer) -> None:
        serve(self.step, counts, answer, device=self.device)
