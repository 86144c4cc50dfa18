"""Aspect-ratio buckets in a whole run: prior images, training, samples, the plan, and what is refused."""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from ldm.commands import evaluate
from ldm.config import instantiate
from ldm.data.buckets import Buckets, Shape
from ldm.errors import UserError
from ldm.families.family import Family
from ldm.families.known import FAMILIES
from ldm.runs.buckets import bucket_unit
from ldm.runs.evaluate_model import photos_of
from ldm.runs.generate_set import generate_set
from ldm.runs.job import plan, run_job
from ldm.runs.memory import estimate
from ldm.runs.options import parse
from ldm.runs.sampling import in_shapes
from ldm.targets import allow
from tests.factories import masks, photos
from tests.short_runs import Job, differences


@pytest.fixture
def words(words: list[str]) -> list[str]:
    """Those of a short run, in buckets."""
    in_buckets = ["data.params.buckets={}", "data.params.num_priors=5"]
    return [*words, *in_buckets, "samples.height=12", "samples.width=24"]


def test_a_run_draws_its_prior_images_at_the_shapes_of_its_photos(words: list[str], workdir: Path, capsys):
    config = parse(words)
    text = plan(config)
    assert "  12 x 20 pixels: 2 photos, 3 prior images of each class\n" in text
    assert "  16 x 16 pixels: 1 photo, 1 prior images of each class\n" in text
    folders = generate_set(config)
    assert capsys.readouterr().out.split("\n")[:3] == [f"{n} generated, 0 were there" for n in (3, 1, 1)]
    found = {}
    for folder in folders:
        sizes = {Image.open(path).size for path in folder.glob("*.png")}
        assert len(sizes) == 1
        width, height = sizes.pop()
        found[Shape(height, width)] = len(list(folder.glob("*.png")))
        assert (f"-{height}x{width}-" in folder.name) == (height != width)
    assert found == {Shape(12, 20): 3, Shape(16, 16): 1, Shape(20, 12): 1}
    kept = {path: path.stat().st_mtime_ns for path in workdir.glob("priors/*/*.png")}
    half = next(path for path in kept if "12x20" in path.parent.name)
    half.unlink()  # as a killed process leaves it
    run_job(config)
    now = {path: path.stat().st_mtime_ns for path in workdir.glob("priors/*/*.png")}
    assert now.keys() == kept.keys()
    assert {path for path in kept if now[path] != kept[path]} == {half}
    page = Path("logs/one/report.html").read_text(encoding="utf-8")
    assert "12 x 20: 2 photos, 16 x 16: 1 photo, 20 x 12: 1 photo" in page
    assert json.loads(Path("logs/one/metrics.json").read_text())["prior_images"] == 5
    assert {Image.open(path).size for path in Path("logs/one/samples").glob("0*.png")} == {(24, 12)}


def test_samples_have_the_shapes_of_the_photos_in_turn(words: list[str], workdir: Path):
    words = [*words, "samples.height=null", "samples.width=null", "samples.n=4", "samples.seed=6"]
    run_job(parse(words))
    for folder in ("samples", "samples/before"):
        for row in range(len(parse(words).samples.prompts)):
            files = [Path("logs/one", folder, f"{row:02d}-{i:02d}.png") for i in range(4)]
            assert [Image.open(file).size for file in files] == [(20, 12), (16, 16), (12, 20), (20, 12)]
        text = Image.open(Path("logs/one", folder, "00-02.png")).text
        settings = json.loads(text["dreambooth"])
        assert (settings["height"], settings["width"], settings["seed"]) == (20, 12, 6 + 2)
        assert settings["sampler"] == parse(words).samples.sampler
        assert "Seed: 8, Size: 12x20" in text["parameters"]


class Recorder:
    """A pipeline whose images are the settings of their call."""

    def __call__(self, prompts: list[str], *, seeds: list[int], **how: int) -> list[dict]:
        pairs = zip(prompts, seeds, strict=True)
        return [{"prompt": prompt, "seed": seed, **how} for prompt, seed in pairs]


def test_a_seed_decides_a_shape_whatever_else_is_asked_for():
    generate = in_shapes(Recorder(), [Shape(2, 4), Shape(3, 3)])
    found = generate(["a", "b", "c"], seeds=[5, 4, 7], steps=9)
    assert found == [
        {"prompt": "a", "seed": 5, "steps": 9, "height": 3, "width": 3},
        {"prompt": "b", "seed": 4, "steps": 9, "height": 2, "width": 4},
        {"prompt": "c", "seed": 7, "steps": 9, "height": 3, "width": 3},
    ]
    assert generate(["b"], seeds=[4], steps=9) == [found[1]]
    assert generate(["a"], seeds=[5], height=8) == [{"prompt": "a", "seed": 5, "height": 8}]
    assert generate([], seeds=[]) == []
    plain = Recorder()
    assert in_shapes(plain, ()) is plain


OWN = """
class Widths:
    \"\"\"How wide the samples are.\"\"\"

    better = {"width": "lower"}
    guidance_base = False
    sampling = {}
    seeds = class_samples = seed = 0

    def unfit(self, photos, prompts):
        return []

    def subject(self, photos):
        return None

    def measure(self, pipeline, *, subject, prompts, is_base=False):
        how = {"sampler": "ddim", "guidance_scale": 1.0, "steps": 1}
        samples = pipeline([prompts.subject] * 5, seeds=[0, 1, 2, 3, 4], batch_size=2, **how)
        return [sample.image.width for sample in samples]

    def summary(self, after, base, subject):
        return {"widths": after, "of_base": base}

    def score(self, metrics):
        return 0.0

    def measure_images(self, samples, *, subject, prompts, of_class):
        return {}
"""


def test_an_evaluation_is_of_the_shapes_of_the_photos(
    words: list[str], workdir: Path, monkeypatch: pytest.MonkeyPatch
):
    (workdir / "widths.py").write_text(OWN)
    monkeypatch.syspath_prepend(workdir)
    allow("widths")
    run_job(parse([*words, "evaluation={target: widths.Widths}"]))
    metrics = json.loads(Path("logs/one/metrics.json").read_text())
    assert metrics["widths"] == metrics["of_base"] == [20, 16, 12, 20, 16]
    evaluate.main(evaluate.parse(["--model", "logs/one"]))
    later = json.loads(Path("logs/one/evaluation/metrics.json").read_text())
    assert later["widths"] == later["of_base"] == metrics["widths"]


def test_photos_that_a_run_is_measured_on_need_no_masks_and_captions(
    words: list[str], workdir: Path, subject_folder: Path
):
    masks(subject_folder)
    own = ["data.params.captions=true", "data.params.caption_shuffle={keep: 1}"]
    config = parse([*words, *own, "model.params.objective.masks={outside: 0.1}"])
    other = photos(workdir / "others")
    names = {"class_word": None, "identifier": None}
    data = photos_of(Namespace(data_root=str(other), **names), config)
    assert data.unit == bucket_unit(instantiate(config.model).networks) and not data.masks
    assert {photo.path.parent for photo in data.subject_photos} == {other}
    assert data.sample_shapes == photos_of(Namespace(data_root=None, **names), config).sample_shapes


def test_a_step_split_into_micro_batches_is_the_step(job: Job, tmp_path: Path):
    """One bucket a step: rounding alone tells two micro-batches of one photo from a batch of two."""
    job = replace(job, data={"buckets": Buckets(unit=4), "crop": "random"})
    sgd = {"optimizer": {"target": "torch.optim.SGD"}, "trainable": {"learning_rate": 0.1}}
    whole = job(tmp_path / "whole", params=sgd).state_dict()
    split = replace(job, batch_size=1, accumulate=2)(tmp_path / "split", params=sgd).state_dict()
    base = {f"model.diffusion_model.{name}": value for name, value in job.weights["unet"].items()}
    learned = torch.cat([(whole[name] - base[name]).flatten() for name in base]).norm()
    apart = torch.cat([(whole[name] - split[name]).flatten() for name in base]).norm()
    assert 0 < learned and apart < 1e-4 * learned


def test_square_photos_train_to_the_bit_as_without_buckets(job: Job, tmp_path: Path):
    squares = tmp_path / "squares"
    squares.mkdir()
    for k, side in enumerate((24, 32, 40)):
        Image.effect_noise((side, side), 60).convert("RGB").save(squares / f"{k}.png")
    job = replace(job, subject=squares, data={"crop": "random"})
    plain = job(tmp_path / "plain")
    bucketed = replace(job, data={"crop": "random", "buckets": Buckets(unit=4)})(tmp_path / "bucketed")
    assert differences(plain.state_dict(), bucketed.state_dict()) == []


# --- the forecast ------------------------------------------------------------------------------------------


def activations(words: list[str], *more: str) -> int:
    return sum(need.activations for need in estimate(parse([*words, *more]))[0].values())


def test_the_forecast_is_of_the_largest_bucket(words: list[str], subject_folder: Path):
    largest = activations(words)  # a square one is among them
    assert largest == activations(words, "data.params.buckets=null")
    (subject_folder / "2.png").unlink()
    smaller = activations(words)
    assert 0.9 * largest < smaller < largest  # 12 x 20 pixels of 16 x 16
    graphed = activations(words, "model.params.cuda_graph=true")
    assert graphed == 2 * smaller  # graphs of both shapes keep theirs


# --- the unit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_released_families_say_their_unit(family: Family):
    """By the widths of the UNet, whatever else it is."""
    width, context = family.released
    tensors = {
        "input_blocks.0.0.weight": torch.empty(width, 4, 3, 3, device="meta"),
        "middle_block.1.transformer_blocks.0.attn2.to_k.weight": torch.empty(width, context, device="meta"),
    }
    assert bucket_unit({"unet": SimpleNamespace(state_dict=lambda: tensors)}) == family.bucket_unit == 64


def test_other_networks_take_what_they_halve(tiny_networks: dict[str, nn.Module]):
    assert bucket_unit(tiny_networks) == 4


REFUSED = {
    "unit": (
        "data.params.buckets.unit=6",
        "A unit of 6 pixels is no multiple of the 4 that the networks take",
    ),
    "negative": (
        "data.params.buckets.unit=0",
        r"0 \(int\) should be int \(at least 1\) or None \(data.params.buckets.unit",
    ),
    "misspelt": ("data.params.buckets.units=4", "data.params.buckets.units.*unit"),
    "samples": ("samples.height=13", r"height 13 is not a multiple of 4 pixels \(samples\)"),
    "priors": ("data.params.num_priors=1", "1 prior images are fewer than the 3 buckets"),
    "shape": ("data.params.buckets.min_side=40", "min_side 40 leaves the square of 16 pixels out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_any_work(words: list[str], case: str):
    word, message = REFUSED[case]
    more = ["data.params.size=24"] if case == "unit" else []
    with pytest.raises(UserError, match=message):
        run_job(parse([*words, word, *more]))
    assert not Path("logs").exists() and not Path("priors").exists()
