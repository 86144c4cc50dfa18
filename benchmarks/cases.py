"""What is measured: the networks' sizes, and the cases."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ldm.config import load_config, to_container

ROOT = Path(__file__).resolve().parents[1]
SUBJECT, PRIOR = "a photo of sks dog", "a photo of a dog"
TEXT = {"tokenizer": "ldm/storybook/assets/tokenizer", "bos_token_id": 649, "eos_token_id": 650}
LORA_RANK = 8


@dataclass(frozen=True)
class Case:
    """One comparison. batch: pictures at a time; in training half are priors. steps: of the sampler.

    lean: ours steps the weights in the backward pass, keeps no gradients and computes the two finest levels
    again; diffusers, which has no flag for the former, runs with gradient checkpointing.
    moments: ours keeps AdamW's moments in bfloat16, for which diffusers has no flag; a lean one computes all
    levels again, as the preset of 16 GB does.
    """

    size: Literal["storybook", "quarter", "sd1"]
    kind: Literal["train", "sample"]
    batch: int
    text: bool = False  # the text encoder learns too
    lora: bool = False
    lean: bool = False
    moments: bool = False
    steps: int = 0

    @property
    def name(self) -> str:
        if self.kind == "sample":
            return f"{self.size}: {self.steps} DDIM steps with CFG, batch {self.batch}"
        parts = "UNet and text encoder" if self.text else "UNet"
        kind = "LoRA" if self.lora else "lean" if self.lean else "full"
        with_moments = ", bf16 moments" if self.moments else ""
        return f"{self.size}: {kind} training of {parts}{with_moments}, batch {self.batch}"


def cases(device: str, *, quick: bool) -> list[Case]:
    """On a CPU networks of reduced size, on a GPU Stable Diffusion 1.5."""
    if quick:
        return [Case("storybook", "train", 2, text=True), Case("storybook", "sample", 1, steps=2)]
    trained = [{"text": True}, {"text": True, "lean": True}, {}, {"lora": True}]
    if device == "cuda":
        train = [Case("sd1", "train", 2, **kind) for kind in trained]
        return train + [Case("sd1", "sample", batch, steps=50) for batch in (1, 8)]
    trained[1:1] = [{"text": True, "moments": True}, {"text": True, "moments": True, "lean": True}]
    found = [Case("storybook", "train", 8, **kind) for kind in trained]
    found += [Case("quarter", "train", 2, **kind) for kind in trained]
    found += [Case("storybook", "sample", batch, steps=25) for batch in (1, 8, 16)]
    return found + [Case("quarter", "sample", 1, steps=10), Case("quarter", "sample", 8, steps=2)]


def pixels(size: str) -> int:
    """A side of the pictures."""
    return {"storybook": 64, "quarter": 256, "sd1": 512}[size]


def model_params(size: str) -> dict[str, Any]:
    """The params of a model section: the storybook's own, SD 1.5 at a quarter of its widths, or SD 1.5."""
    if size == "storybook":
        return to_container(load_config([ROOT / "configs/dreambooth.yaml"]))["model"]["params"]
    unet, vae, text = {}, {}, dict(TEXT)
    if size == "quarter":
        unet = {"model_channels": 80, "context_dim": 192, "num_groups": 16}
        vae = {"ch": 32}
        text |= {"hidden_size": 192, "intermediate_size": 768}
    return {
        "unet": {"target": "ldm.models.unet.UNetModel", "params": unet},
        "vae": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": vae},
        "text_encoder": {"target": "ldm.models.text_encoder.CLIPTextEncoder", "params": text},
        "trainable": {"learning_rate": 1e-6},
    }
