"""Guidance: the formula, the order of the batch, one pass where one is enough."""

import pytest
import torch

from ldm.diffusion.guidance import classifier_free_guidance

X, T = torch.zeros(2, 1, 1, 1), torch.tensor([3, 4])
PROMPTS, UNCONDITIONAL = [2, 5], [1, 1]


@pytest.fixture
def calls() -> list[tuple[int, list[int]]]:
    return []


@pytest.fixture
def predict(calls):
    """eps = x + t + the number of the prompt; notes the latents and the prompts of each call."""

    def predict(x: torch.Tensor, t: torch.Tensor, prompts: list[int]) -> torch.Tensor:
        calls.append((len(x), prompts))
        times = len(prompts) // len(x)
        return x.repeat(times, 1, 1, 1) + (t.repeat(times) + torch.tensor(prompts))[:, None, None, None]

    return predict


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5, -1.0])
def test_extrapolates_from_unconditional_to_conditional(predict, batched, scale):
    guided = classifier_free_guidance(predict, PROMPTS, UNCONDITIONAL, scale, batched=batched)
    assert guided(X, T).flatten().tolist() == [3 + 1 + scale * 1, 4 + 1 + scale * 4]


def test_one_call_asks_for_unconditional_predictions_first_and_leaves_the_latents_as_they_are(predict, calls):
    classifier_free_guidance(predict, PROMPTS, UNCONDITIONAL, 7.5)(X, T)
    assert calls == [(2, [1, 1, 2, 5])]


def test_two_passes_never_see_a_doubled_batch(predict, calls):
    classifier_free_guidance(predict, PROMPTS, UNCONDITIONAL, 7.5, batched=False)(X, T)
    assert calls == [(2, [1, 1]), (2, [2, 5])]


def test_scale_1_is_a_single_conditional_pass(predict, calls):
    classifier_free_guidance(predict, PROMPTS, UNCONDITIONAL, 1)(X, T)
    assert calls == [(2, [2, 5])]
