"""Steps of a sampling as one CUDA graph give the samples of the plain steps."""

from collections.abc import Callable
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from ldm.cuda_graph import GraphedPrediction
from ldm.denoiser import Denoiser, evaluating
from ldm.diffusion.process import DiscreteDiffusion
from ldm.diffusion.schedule import make_alphas_cumprod
from ldm.pipeline import Text2Image

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def again(work: Callable[[], None], pool: None) -> tuple[Callable[[], None], None]:
    """In the place of `capture`, where there is no GPU: the work is simply done anew."""
    work()
    return work, pool


def pipeline(networks: dict, device: str, *, cuda_graph: bool) -> Text2Image:
    process = DiscreteDiffusion(make_alphas_cumprod())
    return Text2Image(
        *(networks[name].to(device) for name in ("unet", "vae", "text_encoder")),
        process=process,
        default_size=16,
        cuda_graph=cuda_graph,
    )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, GPU])])
def test_samples_are_the_plain_ones(tiny_networks: dict, device: str, monkeypatch: pytest.MonkeyPatch):
    """For one prompt and several, of one kind after another, and after the weights have changed."""
    plain = pipeline(tiny_networks, device, cuda_graph=False)
    graphed = pipeline(tiny_networks, device, cuda_graph=True)
    if device == "cpu":
        count = MagicMock(side_effect=again)
        recorded = GraphedPrediction(graphed.unet, recorded=count, device_type="cpu")
        monkeypatch.setattr(graphed.denoiser, "graph", recorded)
    jobs = [(["a disc"], 1), (["a disc"], 2), (["a disc", "sks disc"], 3), (["sks disc", "a square"], 4)]
    for prompts, seed in [*jobs, *jobs]:
        how = {"seeds": range(seed, seed + len(prompts)), "steps": 4, "guidance_scale": 3.0}
        for a, b in zip(graphed(prompts, **how), plain(prompts, **how), strict=True):
            torch.testing.assert_close(a.latents, b.latents, rtol=1e-4, atol=1e-5)
            assert np.abs(np.asarray(a.image, int) - np.asarray(b.image, int)).max() <= 1
    if device == "cpu":
        assert count.call_count == 4  # of one prompt, of two, and both once more


def test_two_samplings_by_turns_do_not_write_into_each_other(tiny_networks: dict, monkeypatch):
    """Steps of one sampling between those of another: a graph has memory of its own."""
    plain = pipeline(tiny_networks, "cpu", cuda_graph=False).denoiser
    graphed = pipeline(tiny_networks, "cpu", cuda_graph=True).denoiser
    recorded = GraphedPrediction(graphed.unet, recorded=again, device_type="cpu")
    monkeypatch.setattr(graphed, "graph", recorded)
    levels = plain.process.levels(2, "leading")
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))

    def by_turns(denoiser: Denoiser) -> list[torch.Tensor]:
        encodings = denoiser.encode(["a disc", "a square", ""], 3, chunked=False)
        turns = [
            denoiser.conditioned([encodings[""], encodings[text]], levels) for text in list(encodings)[:2]
        ]
        return [denoise(x, level, rows) for level in levels[:2] for denoise, rows in turns + turns]

    with torch.inference_mode(), evaluating(*plain.networks, *graphed.networks):
        for a, b in zip(by_turns(plain), by_turns(graphed), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
