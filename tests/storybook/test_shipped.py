"""The shipped weights are as good as `ldm/storybook/README.md` says, on a small sample."""

from pathlib import Path

import pytest
import torch

from ldm.checkpoints.load import load_state_dicts, open_model
from ldm.config import instantiate, load_config, to_container
from ldm.evaluation.storybook import StorybookEvaluation
from ldm.pipeline import Text2Image
from ldm.storybook.dataset import StorybookDataset
from ldm.storybook.judge import Judge
from ldm.storybook.world import ATTRIBUTES

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "ldm/storybook/assets"
UNSEEN = 77  # a book that no training reads


@pytest.fixture(scope="module")
def drawings() -> list[dict]:
    book = StorybookDataset(seed=UNSEEN)
    return [book[k] for k in range(200)]


def test_they_are_small():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 32 * 2**20


def test_the_judge_reads_drawings(drawings: list[dict]):
    reading = Judge.from_file().read(torch.stack([drawing["image"] for drawing in drawings]))
    for name in ATTRIBUTES:
        wanted = torch.tensor([drawing["labels"][name] for drawing in drawings])
        assert (reading[name] == wanted).float().mean() > 0.96, name


def test_the_autoencoder_redraws(drawings: list[dict]):
    config = to_container(load_config([ROOT / "configs/storybook/base.yaml"]))["model"]["params"]
    autoencoder = instantiate(config["vae"]).eval()
    parts = open_model(ASSETS / "base.safetensors").state_dicts
    load_state_dicts({"vae": autoencoder}, {"vae": parts["vae"]}, where=ASSETS)
    images = torch.stack([drawing["image"] for drawing in drawings[:64]])
    with torch.inference_mode():
        redrawn = autoencoder.decode(autoencoder.encode(images).mean).clamp(-1, 1)
    assert -10 * torch.log10((redrawn - images).square().mean() / 4) > 30  # dB; the peak is 2


def test_the_base_draws_what_captions_say():
    evaluation = StorybookEvaluation(steps=12)
    right = evaluation.examine(Text2Image.from_file(ASSETS / "base.safetensors"), samples=32)
    assert right["class_word"] >= 0.9 and right["context"] >= 0.9 and right["color"] >= 0.75, right
