"""The benchmark's two sides do the same work, and its floor counts it right."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks import ours, peer
from benchmarks.cases import Case, cases
from benchmarks.measure import ADAMW_BYTES, WINDOWS, Side, interleaved, work
from benchmarks.plot import plot

TRAIN = Case("storybook", "train", 2, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("benchmark") / "model"
    ours.export(TRAIN, path)
    return path


def test_both_sides_start_from_the_same_networks(folder):
    mine = ours.Training(TRAIN, device="cpu", compiled=False)
    theirs = peer.Training(TRAIN, folder, device="cpu", compiled=False)
    counts = [sum(p.numel() for p in side.learning) for side in (mine, theirs)]
    assert counts[0] == counts[1] > 1e7
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([10, 900])
    context = mine.module.encode_prompts(["a photo of sks dog", "a photo of a dog"])
    with torch.no_grad():
        one = mine.module.apply_model(x, t, *context)
        other = theirs.unet(x, t, theirs.text(theirs.ids)[0], return_dict=False)[0]
    assert F.mse_loss(one, other) < 1e-8 * other.square().mean()


@pytest.mark.parametrize("case", cases("cpu", quick=True), ids=lambda case: case.name)
def test_both_sides_step(case: Case, folder):
    for module in (ours, peer):
        kind = module.Training if case.kind == "train" else module.Sampling
        side = kind(case, *([folder] if module is peer else []), device="cpu", compiled=False)
        before = [p.detach().clone() for p in side.learning[:5]] if case.kind == "train" else []
        side.step()
        if before:
            assert not all(torch.equal(a, b) for a, b in zip(before, side.learning, strict=False))


def test_a_side_runs_in_a_process_of_its_own(folder):
    case = Case("storybook", "sample", 1, steps=1)
    with Side("ours", case, folder, device="cpu", compiled=False) as side:
        beyond, whole = side.peak_mib
        assert 10 < beyond < whole < 4096
        times = interleaved({"one": side, "other": side}, seconds=0.0)
        assert {len(found) for found in times.values()} == {WINDOWS} and min(times["one"]) > 0
    with pytest.raises(RuntimeError, match="status 1"):
        Side("diffusers", case, folder / "absent", device="cpu", compiled=False)


def test_the_floor_counts_what_learns_and_grows_with_the_batch():
    flops, traffic = work(Case("storybook", "train", 2, text=True))
    assert traffic == ADAMW_BYTES * sum(
        p.numel() for p in ours.Training(TRAIN, device="cpu", compiled=False).learning
    )
    twice, _ = work(Case("storybook", "train", 4, text=True))
    assert twice == pytest.approx(2 * flops, rel=0.1)
    lean = work(Case("storybook", "train", 2, lora=True))
    assert lean[0] < flops and lean[1] < traffic / 10


def test_the_plot_holds_every_case():
    drawn = plot([{"case": "a <b>", "speed_ratio": 1.5}, {"case": "c", "speed_ratio": 0.5}], "Speed")
    assert "a &lt;b&gt;" in drawn and "1.50" in drawn and "0.50" in drawn
