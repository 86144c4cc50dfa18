"""The objective: streams apart, weights on their own items, classes named by the config."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.diffusion.process import DiscreteDiffusion
from ldm.diffusion.schedule import make_alphas_cumprod
from ldm.errors import UserError
from ldm.runs.options import parse
from ldm.training.objective import MinSNR, Objective, StreamLoss, Weighting
from tests.factories import MIN_SNR

ROOT = Path(__file__).resolve().parents[2]
PROCESS = DiscreteDiffusion(make_alphas_cumprod())


def masks(*streams: str) -> dict[str, Tensor]:
    return Objective().select({"stream": streams})["stream_masks"]


PART = ("subject", "subject", "prior", "prior", "prior")


def test_total_is_subject_mean_plus_weighted_prior_mean():
    per_item = torch.tensor([1.0, 3.0, 10.0, 20.0, 30.0])
    loss = Objective(prior_loss_weight=0.5).combine(per_item, masks(*PART))
    logs = {name: value.item() for name, value in loss.logs("train").items()}
    assert logs == {"train/loss": 12.0, "train/subject_loss": 2.0, "train/prior_loss": 20.0}
    order = [2, 0, 4, 1, 3]
    shuffled = masks(*(PART[k] for k in order))
    assert Objective(prior_loss_weight=0.5).combine(per_item[order], shuffled).total.item() == 12.0


@pytest.mark.parametrize(("stream", "other"), [("subject", "prior"), ("prior", "subject")])
def test_a_stream_without_items_is_zero(stream: str, other: str):
    loss = Objective(prior_loss_weight=0.5).combine(torch.tensor([2.0, 4.0]), masks(stream, stream))
    assert loss.streams[stream].item() == 3.0 and loss.streams[other].item() == 0.0
    assert loss.total.item() == (1.5 if stream == "prior" else 3.0)


def test_a_broken_item_of_one_stream_leaves_the_others_gradient_alone():
    per_item = torch.tensor([1.0, 2.0], requires_grad=True)
    Objective(prior_loss_weight=0.25).combine(per_item, masks("subject", "prior")).total.backward()
    assert per_item.grad.tolist() == [1.0, 0.25]
    loss = Objective().combine(torch.tensor([1.0, float("inf")]), masks("subject", "prior"))
    assert loss.streams["subject"].item() == 1.0 and loss.streams["prior"].isinf()


def test_a_third_stream_needs_its_weight_and_target_alone():
    objective = Objective(prior_loss_weight=0.5)
    with pytest.raises(KeyError, match="style"):
        objective.select({"stream": ["style"]})
    objective.streams["style"] = StreamLoss(2.0, "teacher")
    found = objective.select({"stream": ["subject", "style", "prior", "style"]})
    assert objective.needs_reference and found["reference_items"] == [1, 3]
    assert found["reference_rows"].tolist() == [1, 3]
    loss = objective.combine(torch.tensor([1.0, 2.0, 3.0, 4.0]), found["stream_masks"])
    assert loss.total.item() == 1.0 + 0.5 * 3.0 + 2.0 * 3.0
    assert loss.logs("val")["val/style_loss"].item() == 3.0


def test_weights_meet_their_own_items():
    """Subject items at one timestep, prior at another: each half carries the weight of its own."""
    t, zeros = torch.tensor([10, 10, 999, 999]), torch.zeros(4, 4, 2, 2)
    objective = Objective(weighting=MIN_SNR)
    per_item = objective.per_item(PROCESS, zeros + 1, zeros, t)
    assert torch.equal(per_item, MinSNR(gamma=5.0)(PROCESS, t))
    loss = objective.combine(per_item, masks("subject", "subject", "prior", "prior"))
    assert loss.streams["subject"] == per_item[0] < 0.05 and loss.streams["prior"] == 1.0
    assert torch.equal(Objective().per_item(PROCESS, zeros + 1, zeros, t), torch.ones(4))


def test_a_weighting_is_what_can_be_called():
    assert issubclass(MinSNR, Weighting) and not issubclass(Objective, Weighting)
    words = ["--base", str(ROOT / "configs/dreambooth.yaml")]
    with pytest.raises(UserError, match="Objective is no Weighting"):
        parse([*words, "model.params.objective.weighting.target=ldm.training.objective.Objective"])
