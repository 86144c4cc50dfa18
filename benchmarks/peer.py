"""diffusers: a DreamBooth step from its public API, as its train_dreambooth.py takes it, and its pipeline.

With the flags of that script that make it quickest: no gradients kept at zero, text embedded beforehand where
the text encoder is frozen, attention by SDPA, pictures decoded beforehand. Latents are not cached: it cannot.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from torch.nn.utils import clip_grad_norm_

from benchmarks.cases import LORA_RANK, PRIOR, SUBJECT, Case, pixels


def load(folder: Path, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Training:
    def __init__(self, case: Case, folder: Path, *, device: str, compiled: bool):
        pipe, frozen = load(folder), torch.bfloat16 if device == "cuda" else torch.float32
        self.case, self.device, self.frozen = case, device, frozen
        self.unet, self.text, self.vae = pipe.unet.to(device), pipe.text_encoder, pipe.vae.to(device, frozen)
        self.vae.requires_grad_(False)
        self.text.requires_grad_(case.text).to(device, torch.float32 if case.text else frozen)
        if case.lora:
            self.unet.requires_grad_(False).to(frozen)
            targets = ["to_q", "to_k", "to_v", "to_out.0"]
            self.unet.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=targets))
            for parameter in self.unet.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        if compiled:
            self.unet.compile()
        self.noises = DDPMScheduler.from_config(pipe.scheduler.config)
        half, side = case.batch // 2, pixels(case.size)
        captions = [SUBJECT] * half + [PRIOR] * half
        words = pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        self.ids = words.input_ids.to(device)
        self.pixels = torch.rand(case.batch, 3, side, side) * 2 - 1
        with torch.no_grad():
            self.context = None if case.text else self.text(self.ids)[0]
        if self.context is not None:
            del self.text
        learning = [*self.unet.parameters(), *(self.text.parameters() if case.text else ())]
        self.learning = [p for p in learning if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learning, lr=1e-6)

    def step(self) -> None:
        pixels = self.pixels.to(self.device, self.frozen)
        latents = self.vae.encode(pixels).latent_dist.sample() * self.vae.config.scaling_factor
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
        loss.detach().item()  # for its progress bar


class Sampling:
    def __init__(self, case: Case, folder: Path, *, device: str, compiled: bool):
        self.pipe = load(folder, torch.bfloat16 if device == "cuda" else torch.float32).to(device)
        self.pipe.scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        self.case, self.device = case, device
        if compiled:
            self.pipe.unet.compile()

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
