"""Previews show the weights that are measured: the average where there is one, else those that learn."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.contact_sheet import contact_sheet
from ldm.runs.callbacks import Previews
from ldm.runs.sampling import SamplesConfig, generate_samples, text2image
from ldm.training.latent_diffusion import LatentDiffusion
from tests.short_runs import Job, state_of

CONFIG = SamplesConfig(steps=2, n=1, guidance_scale=2.0, every_steps=2)
PROMPTS = ["a photo of sks disc"]
LORA = {"target": "ldm.models.lora.LoRA", "params": {"rank": 2}}


class LatePreviews(Previews):
    """Previews of a pipeline that is made with the module of the run."""

    def __init__(self, folder: Path):
        super().__init__(None, CONFIG, PROMPTS, folder)

    def on_train_start(self, trainer, module: LatentDiffusion) -> None:
        self.pipeline = text2image(module, size=16)


def drawn(module: LatentDiffusion, weights: dict) -> np.ndarray:
    module.load_state_dict(weights)
    return np.asarray(contact_sheet(generate_samples(text2image(module, size=16), CONFIG, PROMPTS)))


@pytest.mark.parametrize(
    "params, ema_decay, accumulate",
    [({}, None, 1), ({}, 0.5, 2), ({"trainable": {"lora": LORA}}, 0.5, 1)],
    ids=["learning", "averaged", "lora-averaged"],
)
def test_a_preview_is_drawn_by_the_weights_that_are_measured(
    job: Job, tmp_path: Path, params: dict, ema_decay: float | None, accumulate: int
):
    job.accumulate = accumulate
    rate = {"trainable": {"learning_rate": 0.05, **params.get("trainable", {})}}
    module = job(tmp_path, params=rate, callbacks=[LatePreviews(tmp_path / "p")], ema_decay=ema_decay)
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["step-000002.png", "step-000004.png"]
    kept = {step: state_of(tmp_path, step) for step in (3, 4)}
    shown = np.asarray(Image.open(tmp_path / "p/step-000004.png"))
    np.testing.assert_array_equal(shown, drawn(module, kept[4]["state_dict"]))
    assert (shown != drawn(module, kept[3]["state_dict"])).any()
    if ema_decay is not None:
        assert (shown != drawn(module, kept[4]["current_model_state"])).any()
