"""This repository's training step and sampler, set up to be timed."""

from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from benchmarks.cases import LORA_RANK, PRIOR, SUBJECT, Case, model_params, pixels
from ldm.checkpoints.geometry import model_config
from ldm.checkpoints.save_folder import save_folder
from ldm.models.text_encoder import load_tokenizer
from ldm.pipeline import Text2Image
from ldm.training.device import keep_freed_memory
from ldm.training.latent_diffusion import LatentDiffusion
from ldm.training.optimizers import adamw

RECOMPUTED = [1, 2]  # levels of the UNet, where it is lean: the finest have the largest activations
BEGIN_AT_ZERO = ("out_layers.3.weight", "proj_out.weight", "out.2.weight")


def build(case: Case, *, compiled: bool = False) -> LatentDiffusion:
    """Networks of random weights, the same at each call."""
    params = model_params(case.size) | {"train_text_encoder": case.text}
    if case.lora:
        params["lora"] = {"target": "ldm.models.lora.LoRA", "params": {"rank": LORA_RANK}}
    if case.lean:
        unet = params["unet_config"]
        params["unet_config"] = unet | {"params": unet["params"] | {"use_checkpoint": RECOMPUTED}}
    torch.manual_seed(0)
    module = LatentDiffusion(**params, compile="default" if compiled else None)
    for name, parameter in module.networks["unet"].named_parameters():
        if name.endswith(BEGIN_AT_ZERO):  # a UNet whose output is 0 would have no work for its gradients
            torch.nn.init.normal_(parameter, std=0.02)
    return module


def export(case: Case, folder: Path) -> Path:
    """The same networks as a diffusers folder, which the peer opens."""
    module = build(Case(case.size, case.kind, case.batch))
    parts = {name: network.state_dict() for name, network in module.networks.items()}
    config = model_config(parts, model_params(case.size))
    tokenizer = load_tokenizer(config["cond_stage_config"]["params"]["tokenizer"]).name_or_path
    return save_folder(folder, parts, config=config, tokenizer=tokenizer, size=pixels(case.size))


class Training:
    """The step of `LatentDiffusion` with fused AdamW and clipping, from cached latents; no Trainer around."""

    def __init__(self, case: Case, *, device: str, compiled: bool):
        keep_freed_memory()
        self.module = build(case, compiled=compiled)
        side = pixels(case.size) // self.module.first_stage_model.factor
        self.module.first_stage_model.cpu()
        for part in ("model", "cond_stage_model", "lora"):
            if getattr(self.module, part) is not None:
                getattr(self.module, part).to(device)
        self.module.alphas_cumprod = self.module.alphas_cumprod.to(device)
        self.module._device = torch.device(device)
        self.device, self.half, self.done = device, case.batch // 2, 0
        self.moments = torch.rand(case.batch, 2 * self.module.first_stage_model.embed_dim, side, side)
        parts = {name: (module, 1e-6) for name, module in self.module.learners.items()}
        self.optimizer = adamw(parts, step_in_backward=case.lean)
        self.learning = [p for group in self.optimizer.param_groups for p in group["params"]]

    def step(self) -> None:
        items = torch.arange(self.done, self.done + self.half).repeat(2)
        batch = {
            "moments": self.moments.to(self.device, non_blocking=True),
            "caption": [SUBJECT] * self.half + [PRIOR] * self.half,
            "is_prior": torch.tensor([False] * self.half + [True] * self.half, device=self.device),
            "item": items,
        }
        self.done += self.half
        batch = self.module.on_before_batch_transfer(batch, 0)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device == "cuda"):
            loss = self.module.training_step(batch, 0)
        loss.backward()
        clip_grad_norm_(self.learning, 1.0)  # of none, if lean
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Sampling:
    """`Text2Image`, from prompts to pictures."""

    def __init__(self, case: Case, *, device: str, compiled: bool):
        keep_freed_memory()
        module = build(case, compiled=compiled).requires_grad_(False)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        unet, first_stage, cond_stage = (n.to(device, dtype).eval() for n in module.networks.values())
        self.draw = Text2Image(
            unet,
            first_stage,
            cond_stage,
            alphas_cumprod=module.alphas_cumprod,
            default_size=pixels(case.size),
        )
        self.case = case

    def step(self) -> None:
        prompts, seeds = [SUBJECT] * self.case.batch, list(range(self.case.batch))
        self.draw(prompts, seeds=seeds, steps=self.case.steps, batch_size=self.case.batch)
