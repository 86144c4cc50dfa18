"""The benchmark's sides do the same work, and its floor counts it right."""

import re
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import convergence, kernels, ours, peer
from benchmarks.beside_diffusers import chosen_cases
from benchmarks.cases import Case, cases
from benchmarks.measure import (
    ADAMW_BYTES,
    LEAST_STEPS,
    MOST_WINDOWS,
    SIDES,
    WINDOWS,
    Side,
    interleaved,
    machine,
    work,
)
from benchmarks.pages import PEERS, speed_table
from benchmarks.plot import plot
from benchmarks.side import open_side
from ldm.errors import UserError
from ldm.storybook.world import ATTRIBUTES, sample_scene

TRAIN = Case("storybook", "train", 2, text=True)
DRAW = Case("storybook", "sample", 1, steps=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("benchmark") / "model"
    ours.export(TRAIN, path)
    return path


def test_the_sides_start_from_the_same_networks(folder):
    mine = ours.Training.of_case(TRAIN, device="cpu")
    theirs = peer.Training(TRAIN, folder, device="cpu", best=False)
    counts = [sum(p.numel() for p in side.learning) for side in (mine, theirs)]
    assert counts[0] == counts[1] > 1e7
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    assert not mapped  # whose pages would count as theirs
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([10, 900])
    told = mine.module.condition(["a photo of sks dog", "a photo of a dog"])
    with torch.no_grad():
        one = mine.module.apply_model(x, t, told)
        other = theirs.unet(x, t, theirs.text(theirs.ids)[0], return_dict=False)[0]
    assert F.mse_loss(one, other) < 1e-8 * other.square().mean()


@pytest.mark.parametrize("case", cases("cpu", quick=True), ids=lambda case: case.name)
@pytest.mark.parametrize("name", SIDES)
def test_every_side_steps(name: str, case: Case, folder):
    side, answers = open_side(name, case, folder, device="cpu", compiled=False), []
    before = [p.detach().clone() for p in side.learning[:5]] if case.kind == "train" else []
    side.serve(iter([1, 2]), answers.append)
    assert len(answers) == 2 and min(answers) > 0
    if before:
        assert not all(torch.equal(a, b) for a, b in zip(before, side.learning, strict=False))


def test_our_steps_are_as_many_as_asked_for_and_take_a_batch_each():
    side = ours.Training.of_case(TRAIN, device="cpu")
    step, seen = side.module.training_step, []

    def training_step(batch: dict, batch_idx: int) -> torch.Tensor:
        seen.append(batch["item"].tolist())
        return step(batch, batch_idx)

    side.module.training_step = training_step
    side.serve(iter([1, 2]), lambda seconds: None)
    assert seen == [[0, 0], [1, 1], [2, 2]]


def test_weights_for_sampling_are_cast_before_they_are_on_the_gpu(monkeypatch: pytest.MonkeyPatch):
    moved = []

    class Network:
        def to(self, *where: object) -> "Network":
            moved.append(where)
            return self

        def eval(self) -> "Network":
            return self

    module = SimpleNamespace(networks={"unet": Network()}, process=None)
    module.requires_grad_ = lambda on: module
    monkeypatch.setattr(ours, "build", lambda params, device: module)
    monkeypatch.setattr(ours, "Text2Image", lambda *networks, **how: networks)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: moved.append("freed"))
    ours.Sampling(Case("storybook", "sample", 1, steps=1), device="cuda")
    assert moved == [("cpu", torch.bfloat16), "freed", ("cuda",)]


def test_only_cases_that_train_are_compiled():
    options = Namespace(device="cuda", quick=False, compile=True, only=[])
    assert {case.kind for case in chosen_cases(options)} == {"train"}
    options.compile = False
    assert {case.kind for case in chosen_cases(options)} == {"train", "sample"}
    options.compile, options.only = True, ["DDIM"]
    with pytest.raises(UserError, match="No case holds DDIM"):
        chosen_cases(options)


@pytest.mark.parametrize("name", ["script", "best"])
def test_the_peer_computes_again_where_we_do(name: str, folder):
    lean = Case("storybook", "train", 2, text=True, lean=True)
    side = peer.Training(lean, folder, device="cpu", best=name == "best")
    usual = peer.Training(TRAIN, folder, device="cpu", best=name == "best")
    assert side.unet.is_gradient_checkpointing and side.text.is_gradient_checkpointing
    assert not usual.unet.is_gradient_checkpointing and not usual.text.is_gradient_checkpointing


def test_the_peer_at_its_best_does_the_same_work_from_cached_latents(folder):
    script, best = (peer.Training(TRAIN, folder, device="cpu", best=best) for best in (False, True))
    assert not hasattr(best, "vae")
    assert best.optimizer.defaults["fused"] and not script.optimizer.defaults["fused"]
    assert best.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    best.posterior = script.vae.encode(script.pixels).latent_dist  # of the same images
    gradients = []
    for side in (script, best):
        side.optimizer.zero_grad = lambda set_to_none: None
        torch.manual_seed(0)
        side.step()
        gradients.append(torch.cat([p.grad.flatten() for p in side.learning]))
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[0].norm()


def test_a_side_runs_in_a_process_of_its_own(folder):
    case = Case("storybook", "sample", 1, steps=1)
    with Side("ours", case, folder, device="cpu", compiled=False) as side:
        beyond, whole = side.peak_mib
        assert 10 < beyond < whole < 4096
        times = interleaved({"one": side, "other": side}, seconds=0.0)
        assert {len(found) for found in times.values()} == {WINDOWS} and min(times["one"]) > 0
    with pytest.raises(RuntimeError, match="status 1"):
        Side("best", case, folder / "absent", device="cpu", compiled=False)


def test_a_window_holds_as_many_steps_as_it_must():
    class Counted:
        def __init__(self):
            self.asked = []

        def seconds(self, steps: int) -> float:
            self.asked.append(steps)
            return steps

    side = Counted()
    interleaved({"one": side}, seconds=1.0, least=LEAST_STEPS)
    assert side.asked == [1, 1, *[LEAST_STEPS] * 14]  # until more than ROOM seconds are spent
    side.asked.clear()
    interleaved({"one": side}, seconds=0.2, least=LEAST_STEPS)
    assert side.asked == [1, 1, *[LEAST_STEPS] * (1 + WINDOWS)]
    side.asked.clear()
    interleaved({"one": side}, seconds=9.0)
    assert side.asked == [1, 1, *[9] * (1 + MOST_WINDOWS)]


def test_what_the_machine_does_at_best():
    flops, bandwidth = machine("cpu")
    assert 1e9 < flops < 1e14 and 1e8 < bandwidth < 1e13


def test_the_floor_counts_what_learns_and_grows_with_the_batch():
    flops, traffic = work(Case("storybook", "train", 2, text=True))
    learning = ours.Training.of_case(TRAIN, device="cpu").learning
    assert traffic == ADAMW_BYTES * sum(p.numel() for p in learning)
    assert work(Case("storybook", "train", 2, text=True, moments=True))[1] == 0.75 * traffic
    twice, _ = work(Case("storybook", "train", 4, text=True))
    assert twice == pytest.approx(2 * flops, rel=0.1)
    lean = work(Case("storybook", "train", 2, lora=True))
    assert lean[0] < flops and lean[1] < traffic / 10


def test_the_plot_holds_every_case_and_series():
    drawn = plot({"a <b>": {"x": 1.5, "y": 3.0}, "c": {"x": 0.5}}, "Speed", line=1.0)
    assert "a &lt;b&gt;" in drawn and all(number in drawn for number in ("1.50", "3.00", "0.50"))
    widths = re.findall(r'width="([0-9.]+)" height="18"', drawn)
    assert [float(width) for width in widths] == pytest.approx([210, 420, 70])


def test_the_table_has_both_peers():
    side = {"ms": 10.0, "images_per_second": 5.0, "share_of_floor": 0.5}
    row = {"case": "c", "ours": side, "script": side | {"images_per_second": 2.5}, "best": side}
    for what in ("speed", "memory"):
        row |= {f"{what}_ratio_{name}": value for name, value in zip(PEERS, (2.0, 1.25), strict=True)}
    about = {"cores": 2, "device": "x", "precision": "fp32", "versions": {"torch": "2"}}
    assert "| c | 2.00, 1.25 | 2.00, 1.25 | 10 | 5, 2.5, 5 | 0.50 |" in speed_table(about, [row])


def test_the_table_of_convergence():
    """Heun's steps are those of as many predictions; what is asked for is read against the captions."""
    predictions = {count: 2 * convergence.steps_of("heun", count) - 1 for count in convergence.PREDICTIONS}
    assert all(0 <= count - found <= 1 for count, found in predictions.items())
    assert convergence.steps_of("ddim", 8) == 8
    scenes = [sample_scene(k) for k in range(3)]
    reading = {name: torch.tensor([scene.labels()[name] for scene in scenes]) for name in ATTRIBUTES}
    assert convergence.right(reading, scenes) == 1
    reading["color"] = (reading["color"] + 1) % 3
    assert convergence.right(reading, scenes) == pytest.approx(1 - 1 / len(reading))
    ones = torch.ones(2, 3, 4, 4)
    assert convergence.rms(ones, 3 * ones).tolist() == [2.0, 2.0]
    row = {"distance": 0.25, "standard_error": 0.01, "right": 0.975}
    lines = convergence.table({"ddim": [row] * 5, "euler": [row] * 4}).splitlines()
    assert lines[0] == "| predictions: | 6 | 8 | 12 | 20 | 50 |"
    assert {line.count("|") for line in lines} == {7} and lines[2].count("0.250, 97.5%") == 5


def test_the_time_of_a_step_is_told_by_kind_of_kernel(folder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "ROUNDS", 1)
    monkeypatch.setattr(kernels, "STEPS", {"train": 1, "sample": 1})
    for name in ("ours", "best"):
        found = kernels.milliseconds(name, TRAIN, folder)
        assert min(found.values()) > 0  # an operator that torch renames would be missing
        drawn = kernels.milliseconds(name, DRAW, folder)
        assert min(drawn["convolution"], drawn["attention"], drawn[kernels.WHOLE]) > 0 == drawn["AdamW"]


def test_shared_is_the_lesser_of_both_sides():
    ours_, best = ({kind: 10.0 for kind in kernels.KERNELS} | {kernels.WHOLE: 100.0} for _ in range(2))
    ours_["copies"], best["copies"] = 30.0, 2.0
    told = kernels.report(TRAIN, ours_, best)
    assert "| copies | 30.0 | 2.0 |" in told and "Shared: 82% of ours." in told
    assert "60% of ours, 60% of diffusers' best" in told
