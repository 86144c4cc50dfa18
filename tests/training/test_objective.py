"""The objective: streams apart, weights on their own items, classes named by the config."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.diffusion.process import DiscreteDiffusion
from ldm.diffusion.schedule import make_alphas_cumprod
from ldm.errors import UserError
from ldm.training.objective import MinSNR, Objective, Weighting
from ldm.training.options import parse
from tests.factories import MIN_SNR

ROOT = Path(__file__).resolve().parents[2]
PROCESS = DiscreteDiffusion(make_alphas_cumprod())


def streams(is_prior: list[bool]) -> dict[str, Tensor]:
    return {"subject": ~torch.tensor(is_prior), "prior": torch.tensor(is_prior)}


def test_total_is_subject_mean_plus_weighted_prior_mean():
    per_item, is_prior = torch.tensor([1.0, 3.0, 10.0, 20.0, 30.0]), [False, False, True, True, True]
    loss = Objective(prior_loss_weight=0.5).combine(per_item, streams(is_prior))
    logs = {name: value.item() for name, value in loss.logs("train").items()}
    assert logs == {"train/loss": 12.0, "train/subject_loss": 2.0, "train/prior_loss": 20.0}
    order = [2, 0, 4, 1, 3]
    shuffled = streams([is_prior[k] for k in order])
    assert Objective(prior_loss_weight=0.5).combine(per_item[order], shuffled).total.item() == 12.0


@pytest.mark.parametrize("prior", [False, True])
def test_a_stream_without_items_is_zero(prior: bool):
    loss = Objective(prior_loss_weight=0.5).combine(torch.tensor([2.0, 4.0]), streams([prior] * 2))
    assert loss.streams["prior" if prior else "subject"].item() == 3.0
    assert loss.streams["subject" if prior else "prior"].item() == 0.0
    assert loss.total.item() == (1.5 if prior else 3.0)


def test_a_broken_item_of_one_stream_leaves_the_others_gradient_alone():
    per_item = torch.tensor([1.0, 2.0], requires_grad=True)
    Objective(prior_loss_weight=0.25).combine(per_item, streams([False, True])).total.backward()
    assert per_item.grad.tolist() == [1.0, 0.25]
    loss = Objective().combine(torch.tensor([1.0, float("inf")]), streams([False, True]))
    assert loss.streams["subject"].item() == 1.0 and loss.streams["prior"].isinf()


def test_weights_meet_their_own_items():
    """Subject items at one timestep, prior at another: each half carries the weight of its own."""
    t, zeros = torch.tensor([10, 10, 999, 999]), torch.zeros(4, 4, 2, 2)
    objective = Objective(weighting=MIN_SNR)
    per_item = objective.per_item(PROCESS, zeros + 1, zeros, t)
    assert torch.equal(per_item, MinSNR(gamma=5.0)(PROCESS, t))
    loss = objective.combine(per_item, streams([False, False, True, True]))
    assert loss.streams["subject"] == per_item[0] < 0.05 and loss.streams["prior"] == 1.0
    assert torch.equal(Objective().per_item(PROCESS, zeros + 1, zeros, t), torch.ones(4))


def test_a_weighting_is_what_can_be_called():
    assert issubclass(MinSNR, Weighting) and not issubclass(Objective, Weighting)
    words = ["--base", str(ROOT / "configs/dreambooth.yaml")]
    with pytest.raises(UserError, match="Objective is no Weighting"):
        parse([*words, "model.params.objective.weighting.target=ldm.training.objective.Objective"])
