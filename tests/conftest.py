"""What most tests need: tiny networks of Stable Diffusion's make, a model file of them, a few photos."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm import targets
from ldm.checkpoints.save import save_model
from ldm.diffusion.schedule import make_alphas_cumprod
from tests import factories

pytest_plugins = ["tests.errors_page", "tests.short_runs"]
torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def allowed_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test lets in by --allow is let in for that test alone."""
    monkeypatch.setattr(targets, "ALLOWED", list(targets.ALLOWED))


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
    return factories.model_config(tiny_tokenizer)


@pytest.fixture
def tiny_networks(tiny_config: dict) -> dict[str, nn.Module]:
    return factories.networks(tiny_config)


@pytest.fixture
def tiny_model_file(tmp_path: Path, tiny_config: dict, tiny_networks: dict[str, nn.Module]) -> Path:
    """`tiny_networks` in one safetensors file with its config in the metadata, as a run leaves it."""
    return save_model(
        tmp_path / "tiny.safetensors",
        {part: network.state_dict() for part, network in tiny_networks.items()},
        alphas_cumprod=make_alphas_cumprod(**factories.SCHEDULE),
        dtype=torch.float32,
        metadata={"ldm.config": json.dumps(tiny_config)},
    )


@pytest.fixture
def subject_folder(tmp_path: Path) -> Path:
    return factories.photos(tmp_path / "subject")
