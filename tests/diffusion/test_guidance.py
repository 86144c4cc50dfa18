"""Guidance: the formula, the order of the batch, one pass where one is enough."""

import pytest
import torch

from ldm.diffusion.guidance import classifier_free_guidance
from ldm.diffusion.process import Level

X, LEVEL = torch.zeros(2, 1, 1, 1), Level(0.6, 0.8, 3.0)
PROMPTS, UNCONDITIONAL = [2, 5], [1, 1]


@pytest.fixture
def calls() -> list[tuple[int, list[int]]]:
    return []


@pytest.fixture
def denoise(calls):
    """x0 = x + t + the number of the prompt; notes the latents and the prompts of each call."""

    def denoise(x: torch.Tensor, level: Level, prompts: list[int]) -> torch.Tensor:
        calls.append((len(x), prompts))
        times = len(prompts) // len(x)
        return x.repeat(times, 1, 1, 1) + (level.t + torch.tensor(prompts))[:, None, None, None]

    return denoise


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5, -1.0])
def test_extrapolates_from_unconditional_to_conditional(denoise, batched, scale):
    guided = classifier_free_guidance(denoise, PROMPTS, UNCONDITIONAL, scale, batched=batched)
    assert guided(X, LEVEL).flatten().tolist() == [3 + 1 + scale * 1, 3 + 1 + scale * 4]


def test_one_call_asks_for_unconditional_predictions_first_and_leaves_the_latents_as_they_are(denoise, calls):
    classifier_free_guidance(denoise, PROMPTS, UNCONDITIONAL, 7.5)(X, LEVEL)
    assert calls == [(2, [1, 1, 2, 5])]


def test_two_passes_never_see_a_doubled_batch(denoise, calls):
    classifier_free_guidance(denoise, PROMPTS, UNCONDITIONAL, 7.5, batched=False)(X, LEVEL)
    assert calls == [(2, [1, 1]), (2, [2, 5])]


def test_scale_1_is_a_single_conditional_pass(denoise, calls):
    classifier_free_guidance(denoise, PROMPTS, UNCONDITIONAL, 1)(X, LEVEL)
    assert calls == [(2, [2, 5])]
