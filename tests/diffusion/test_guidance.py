"""Guidance: the formula, the order of the batch, one pass where one is enough."""

import pytest
import torch

from ldm.diffusion.guidance import classifier_free_guidance

X, T = torch.zeros(2, 1, 1, 1), torch.tensor([3, 4])
CONTEXT, UNCONDITIONAL = torch.full((2, 5, 1), 2.0), torch.ones(1, 5, 1)


@pytest.fixture
def calls() -> list[torch.Tensor]:
    return []


@pytest.fixture
def predict(calls):
    """eps = x + t + the mean of the context; notes the context of each call."""

    def predict(x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        calls.append(context.mean(dim=(1, 2)))
        return x + (t + calls[-1])[:, None, None, None]

    return predict


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("scale, gain", [(0.0, 1.0), (1.0, 2.0), (7.5, 8.5), (-1.0, 0.0)])
def test_extrapolates_from_unconditional_to_conditional(predict, batched, scale, gain):
    guided = classifier_free_guidance(predict, CONTEXT, UNCONDITIONAL, scale, batched=batched)
    assert guided(X, T).flatten().tolist() == [3 + gain, 4 + gain]


def test_one_batch_holds_unconditional_items_first(predict, calls):
    classifier_free_guidance(predict, CONTEXT, UNCONDITIONAL, 7.5)(X, T)
    assert [c.tolist() for c in calls] == [[1, 1, 2, 2]]


def test_two_passes_never_see_a_doubled_batch(predict, calls):
    classifier_free_guidance(predict, CONTEXT, UNCONDITIONAL, 7.5, batched=False)(X, T)
    assert [c.tolist() for c in calls] == [[1, 1], [2, 2]]


def test_scale_1_is_a_single_conditional_pass(predict, calls):
    classifier_free_guidance(predict, CONTEXT, UNCONDITIONAL, 1)(X, T)
    assert [c.tolist() for c in calls] == [[2, 2]]
