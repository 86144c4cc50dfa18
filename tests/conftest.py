"""What most tests need: tiny networks of Stable Diffusion's make, a model file of them, a few photos."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn

from ldm.checkpoints.save import save_model
from ldm.config import instantiate
from ldm.diffusion.schedule import make_alphas_cumprod

pytest_plugins = ["tests.errors_page"]
torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parent.parent
SCHEDULE = {"beta_schedule": "scaled_linear", "linear_start": 0.00085, "linear_end": 0.012, "timesteps": 1000}


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a CLIP tokenizer without merges: one token per character of printable ASCII, 32 at most."""
    folder = tmp_path_factory.mktemp("tokenizer")
    characters = [chr(code) for code in range(33, 127)]
    vocabulary = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


@pytest.fixture
def tiny_config(tiny_tokenizer: Path) -> dict:
    """Params of a model section: networks of 32 channels and 2 levels, latents half as wide as pictures."""
    tokens = 2 * (127 - 33) + 2
    return {
        "unet": {
            "target": "ldm.models.unet.UNetModel",
            "params": {
                "model_channels": 32,
                "channel_mult": [1, 2],
                "num_res_blocks": 1,
                "attention_resolutions": [1, 2],
                "num_heads": 4,
                "context_dim": 32,
            },
        },
        "vae": {
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1},
        },
        "text_encoder": {
            "target": "ldm.models.text_encoder.CLIPTextEncoder",
            "params": {
                "vocab_size": tokens,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "max_length": 32,
                "tokenizer": str(tiny_tokenizer),
                "bos_token_id": tokens - 2,
                "eos_token_id": tokens - 1,
            },
        },
        "parameterization": "eps",
        **SCHEDULE,
    }


@pytest.fixture
def tiny_networks(tiny_config: dict) -> dict[str, nn.Module]:
    """Fresh networks of `tiny_config`, the same weights every time: {"unet", "vae", "text_encoder"}."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks = {part: instantiate(tiny_config[part]) for part in ("unet", "vae", "text_encoder")}
        for parameter in networks["unet"].parameters():  # SD starts some layers at zero, which hides mistakes
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    return {part: network.eval() for part, network in networks.items()}


@pytest.fixture
def tiny_model_file(tmp_path: Path, tiny_config: dict, tiny_networks: dict[str, nn.Module]) -> Path:
    """`tiny_networks` in one safetensors file with its config in the metadata, as a run leaves it."""
    return save_model(
        tmp_path / "tiny.safetensors",
        {part: network.state_dict() for part, network in tiny_networks.items()},
        alphas_cumprod=make_alphas_cumprod(**SCHEDULE),
        dtype=torch.float32,
        metadata={"ldm.config": json.dumps(tiny_config)},
    )


@pytest.fixture
def subject_folder(tmp_path: Path) -> Path:
    """Four photos of one red disc, of several sizes and formats."""
    folder = tmp_path / "subject"
    folder.mkdir()
    for k, (size, suffix) in enumerate(
        [((40, 24), "png"), ((24, 40), "jpg"), ((32, 32), "png"), ((64, 48), "webp")]
    ):
        photo = Image.new("RGB", size, (40 * k, 160, 200))
        ImageDraw.Draw(photo).ellipse((4 + k, 4, 18 + k, 18), fill=(200, 30, 30))
        photo.save(folder / f"{k}.{suffix}")
    return folder
