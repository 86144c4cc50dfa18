"""This repository's training step and sampler, set up to be timed."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from benchmarks.cases import LORA_RANK, PRIOR, SUBJECT, Case, model_params, pixels
from benchmarks.timing import Answer, serve, timed_by_callback
from ldm.checkpoints.infer_config import model_config
from ldm.checkpoints.save_folder import save_folder
from ldm.config import instantiate
from ldm.engine.gradients import FreeGradients
from ldm.models.text_encoder import load_tokenizer
from ldm.optim.optimizer_nodes import FUSED_BACKWARD, OptimizerNode, steps_in_backward
from ldm.pipeline import Text2Image
from ldm.runs.callbacks import OffloadVAE
from ldm.training.latent_diffusion import LatentDiffusion

RECOMPUTED = [1, 2]  # levels of the UNet, where it is lean: the finest have the largest activations
TARGET = "ldm.training.latent_diffusion.LatentDiffusion"
BEGIN_AT_ZERO = ("out_layers.3.weight", "proj_out.weight", "out.2.weight")


def case_params(case: Case, *, compiled: bool | str = False) -> dict[str, Any]:
    """The params of the model section of a case; `compiled`: whether, or in which mode."""
    params = model_params(case.size) | {
        "trainable": {"text_encoder": case.text, "learning_rate": 1e-6},
        "compile": "default" if compiled is True else compiled or None,
        "optimizer": case_optimizer(case),
    }
    objective = params.get("objective", {})
    params["objective"] = objective | {"prior_target": "noise"}  # the paper's, and the peer's
    if case.lora:
        lora = {"target": "ldm.models.lora.LoRA", "params": {"rank": LORA_RANK}}
        params["trainable"] = params["trainable"] | {"lora": lora}
    if case.lean:
        unet, recomputed = params["unet"], True if case.moments else RECOMPUTED
        params["unet"] = unet | {"params": unet["params"] | {"use_checkpoint": recomputed}}
    return params


def case_optimizer(case: Case) -> OptimizerNode:
    """Of a case; a lean one steps in the backward pass."""
    name = "adamw_bf16_moments" if case.moments else "adamw"
    return {"target": FUSED_BACKWARD, "params": {"optimizer": name}} if case.lean else name


def build(params: Mapping[str, Any], *, device: str = "cpu") -> LatentDiffusion:
    """Networks of random weights, the same at each call."""
    torch.manual_seed(0)
    with torch.device(device):
        module = instantiate({"target": TARGET, "params": params})
    for name, parameter in module.networks["unet"].named_parameters():
        if name.endswith(BEGIN_AT_ZERO):  # a UNet whose output is 0 would have no work for its gradients
            noise = torch.randn(parameter.shape, device=parameter.device)  # bf16 draws another stream
            parameter.data.copy_(0.02 * noise)
    return module


def export(case: Case, folder: Path, *, device: str = "cpu") -> Path:
    """The same networks as a diffusers folder, which the peer opens."""
    module = build(case_params(Case(case.size, case.kind, case.batch)), device=device)
    parts = {name: network.state_dict() for name, network in module.networks.items()}
    config = model_config(parts, model_params(case.size))
    tokenizer = load_tokenizer(config["text_encoder"]["params"]["tokenizer"]).name_or_path
    return save_folder(folder, parts, config=config, tokenizer=tokenizer, size=pixels(case.size))


class Batches:
    """Endless batches of cached latents, half of them priors, as a run's DataLoader gives them."""

    def __init__(self, module: LatentDiffusion, *, size: str, batch: int):
        side = pixels(size) // module.networks["vae"].factor
        shape = (batch, 2 * module.networks["vae"].embed_dim, side, side)
        self.half = batch // 2
        self.latent_stats = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        if torch.cuda.is_available():
            self.latent_stats = self.latent_stats.pin_memory()

    def __getitem__(self, k: int) -> dict:
        return {
            "latent_stats": self.latent_stats,
            "caption": [SUBJECT] * self.half + [PRIOR] * self.half,
            "stream": ["subject"] * self.half + ["prior"] * self.half,
            "item": torch.arange(k * self.half, (k + 1) * self.half).repeat(2),
        }

    def __iter__(self) -> Iterator[dict]:
        k = 0
        while True:
            yield self[k]
            k += 1


class Training:
    """Steps of `LatentDiffusion` in Lightning's Trainer, as a run takes them; no checkpoints, no log.

    params: of the model section. precision: as a Trainer has it; by default bf16-mixed on a GPU, 32-true
    elsewhere. prepare: changes the module before the Trainer gets it. Each training is served once.
    """

    def __init__(
        self,
        params: Mapping[str, Any],
        *,
        size: str,
        batch: int,
        device: str,
        precision: str | None = None,
        clip: float | None = 1.0,
        prepare: Callable[[LatentDiffusion], object] | None = None,
    ):
        self.module = build({**params, "lr_schedule": "constant"}, device=device)  # for a run without end
        if prepare:
            prepare(self.module)
        self.batches = Batches(self.module, size=size, batch=batch)
        self.precision = precision or ("bf16-mixed" if device == "cuda" else "32-true")
        self.clip = None if steps_in_backward(params.get("optimizer", "adamw")) else clip
        self.device = device

    @classmethod
    def of_case(cls, case: Case, *, device: str, compiled: bool | str = False) -> "Training":
        params = case_params(case, compiled=compiled)
        return cls(params, size=case.size, batch=case.batch, device=device)

    @property
    def learning(self) -> list[torch.nn.Parameter]:
        parts = self.module.trainable_modules.values()
        return [p for part in parts for p in part.parameters() if p.requires_grad]

    def serve(self, counts: Iterator[int], answer: Answer) -> None:
        """Takes as many steps as each number says and answers their seconds."""
        trainer = pl.Trainer(
            accelerator=self.device,
            devices=1,
            precision=self.precision,
            gradient_clip_val=self.clip,
            max_epochs=-1,
            callbacks=[FreeGradients(), OffloadVAE(), timed_by_callback(counts, answer, device=self.device)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(self.module, self.batches)


class Sampling:
    """`Text2Image`, from prompts to pictures."""

    def __init__(self, case: Case, *, device: str, cuda_graph: bool = True):
        module = build(case_params(case), device=device).requires_grad_(False)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        for network in module.networks.values():  # drawn where `export` draws them: the numbers are the same
            network.to("cpu", dtype)
        if device == "cuda":
            torch.cuda.empty_cache()  # float32 weights leave no blocks behind, which the halves would split
        self.pipeline = Text2Image(
            *(network.to(device).eval() for network in module.networks.values()),
            process=module.process,
            default_size=pixels(case.size),
            cuda_graph=cuda_graph,
        )
        self.case = case
        self.device = device

    def step(self) -> None:
        prompts, seeds = [SUBJECT] * self.case.batch, list(range(self.case.batch))
        self.pipeline(prompts, seeds=seeds, steps=self.case.steps, batch_size=self.case.batch)

    def serve(self, counts: Iterator[int], answer: Answer) -> None:
        serve(self.step, counts, answer, device=self.device)
