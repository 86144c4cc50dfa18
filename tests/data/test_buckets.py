"""Aspect-ratio buckets: their shapes, which photo is in which, whose a step is, and what its items show."""

from collections import Counter
from fractions import Fraction
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.data.buckets import Buckets, Shape, nearest, shares
from ldm.data.concepts import ConceptConfig
from ldm.data.dreambooth import DreamBoothDataModule
from ldm.data.images import crop_to, fit_image, upright_size
from ldm.data.items import VALIDATION_START
from ldm.data.priors import PriorSet, PriorSpec
from ldm.data.streams import LONGEST_CYCLE, about_cycle
from ldm.errors import UserError
from tests.data.test_dreambooth import assert_same, by_number, encode, equal, items, noise

SIZE, UNIT = 16, 4
# (height, width) of Podell et al. 2023, appendix I, up to the square; the rest are these turned
PAPER = {
    512: (2048, 1984, 1920, 1856),
    576: (1792, 1728, 1664),
    640: (1600, 1536),
    704: (1472, 1408, 1344),
    768: (1344, 1280),
    832: (1216, 1152),
    896: (1152, 1088),
    960: (1088, 1024),
    1024: (1024,),
}
SMALLER = {(704, 1344), (832, 1152), (896, 1088), (960, 1024)}  # of the paper's, with room for a unit more


# --- shapes ------------------------------------------------------------------------------------------------


def test_those_of_1024_pixels_are_the_papers():
    """All but those that could be a unit higher and a unit wider alike."""
    found = Buckets().shapes(1024, unit=64)
    wide = {(height, width) for height, widths in PAPER.items() for width in widths} - SMALLER
    assert set(found) == wide | {(width, height) for height, width in wide}
    assert [shape.width / shape.height for shape in found] == sorted(
        (shape.width / shape.height for shape in found), reverse=True
    )


def test_a_longest_side_without_end_costs_nothing():
    far = Buckets(min_side=64, max_side=10**15).shapes(512, unit=64)
    assert far[0] == Shape(64, 4096) and far[-1] == Shape(4096, 64)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 16), st.integers(2, 24), st.data())
def test_shapes_are_as_large_as_the_square_allows(unit: int, units: int, data: st.DataObject):
    size = unit * units
    least = data.draw(st.integers(1, size))
    most = data.draw(st.integers(size, 4 * size))
    try:
        found = Buckets(min_side=least, max_side=most).shapes(size, unit=unit)
    except UserError as error:
        assert "leave only the square" in str(error)
        return
    assert len(set(found)) == len(found) > 1 and Shape.square(size) in found
    assert {Shape(shape.width, shape.height) for shape in found} == set(found)
    for shape in found:
        assert all(side % unit == 0 and least <= side <= most for side in shape)
        assert (
            shape.area
            <= size**2
            < max((shape.height + unit) * shape.width, (shape.width + unit) * shape.height)
        )


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5000), st.integers(1, 5000))
def test_a_photo_is_at_the_nearest_aspect_ratio_and_little_is_cropped(height: int, width: int):
    found = Buckets().shapes(512, unit=64)
    shape = nearest(found, height, width)

    def distance(other: Shape) -> float:
        return abs(log(other.width / other.height) - log(width / height))

    assert distance(shape) <= min(map(distance, found)) + 1e-12
    left, top, wide, high = crop_to(shape, width, height, crop="center")
    assert 0 <= left and left + wide <= width and 0 <= top and top + high <= height
    assert wide == width or high == height  # scaled to cover
    assert wide / high == pytest.approx(shape.width / shape.height)
    kept = wide * high / (width * height)
    assert kept == pytest.approx(np.exp(-distance(shape)))
    assert kept >= min(height, width) / max(height, width) - 1e-9  # what the square keeps


def test_the_crop_of_a_shape_has_its_pixels():
    ramp = np.broadcast_to(np.arange(60, dtype=np.uint8)[None, :, None], (20, 60, 3))
    shown = np.asarray(fit_image(Image.fromarray(np.ascontiguousarray(ramp)), Shape(20, 40)))
    np.testing.assert_array_equal(shown, ramp[:, 10:50])  # of 60 columns the middle 40, unscaled


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 200), st.lists(st.integers(1, 50), min_size=1, max_size=12))
def test_shares_are_whole_and_near_the_exact_ones(more: int, weights: list[int]):
    total = len(weights) + more
    found = shares(total, weights)
    assert sum(found) == total and min(found) >= 1
    exact = [total * weight / sum(weights) for weight in weights]
    if min(exact) >= 1:  # no bucket had to be given one
        assert all(abs(n - part) < 1 for n, part in zip(found, exact, strict=True))
    for n, weight in zip(found, weights, strict=True):  # of more photos never fewer, but for a rounding
        assert all(n <= other + 1 for other, more in zip(found, weights, strict=True) if more >= weight)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 10**4), min_size=1, max_size=30).filter(any))
def test_long_cycles_are_rounded_and_none_is_left_out(counts: list[int]):
    found = about_cycle([Fraction(count) for count in counts])
    assert [count > 0 for count in found] == [count > 0 for count in counts]
    assert sum(found) <= LONGEST_CYCLE + len(counts)
    for count, exact in zip(found, counts, strict=True):
        assert abs(count / sum(found) - exact / sum(counts)) <= 2 * len(counts) / LONGEST_CYCLE


# --- items -------------------------------------------------------------------------------------------------


def folder(path: Path, sizes: list[tuple[int, int]], *, seed: int) -> str:
    """Photos of these heights and widths."""
    path.mkdir()
    for k, (height, width) in enumerate(sizes):
        noise(100 * seed + k, height, width).save(path / f"{k}.png")
    return str(path)


WIDE, SQUARE, TALL = (24, 40), (32, 32), (44, 26)
MIXED = [WIDE, SQUARE, TALL, WIDE, WIDE, SQUARE]
SHAPES = {WIDE: Shape(12, 20), SQUARE: Shape(16, 16), TALL: Shape(20, 12)}


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    return {
        "subject_root": folder(tmp_path / "subject", MIXED, seed=0),
        "prior_root": folder(tmp_path / "class", [*MIXED, TALL, SQUARE, SQUARE], seed=1),
    }


def ready(priors: list[PriorSet] = (), **params) -> DreamBoothDataModule:
    word = {} if "concepts" in params else {"class_word": "dog"}
    params = {"size": SIZE, "crop": "random", "buckets": Buckets(unit=UNIT), **params}
    data = DreamBoothDataModule(**word, **params)
    data.check()
    data.attach(encode=encode, vae_hash="v", priors=priors, latent_factor=2)
    data.setup()
    return data


def shape_of(row: dict) -> Shape:
    return Shape(*(2 * side for side in row["latent_stats"].shape[1:]))


def test_a_step_has_one_bucket_and_buckets_have_steps_by_their_photos(folders: dict):
    data = ready(**folders, batch_size=3, prior_batch_size=2)
    assert data.buckets_in_use.counts() == {Shape(12, 20): 3, Shape(16, 16): 2, Shape(20, 12): 1}
    rows = items(data, 12)
    steps = [rows[5 * n : 5 * n + 5] for n in range(12)]
    for step in steps:
        assert len({shape_of(row) for row in step}) == 1
        for row in step:
            assert row["sizes"][4:].tolist() == list(shape_of(row))
    seen = [shape_of(step[0]) for step in steps]
    wanted = Counter({Shape(12, 20): 3, Shape(16, 16): 2, Shape(20, 12): 1})
    assert Counter(seen[:6]) == Counter(seen[6:]) == wanted and seen[:6] != seen[6:]
    assert [row["item"].item() for row in rows if row["stream"] == "subject"] == list(range(36))


def test_each_photo_is_shown_as_often_as_any_other(folders: dict):
    data = ready(**folders, batch_size=2)
    seen = {"subject": Counter(), "prior": Counter()}
    for (name, _, place), _ in zip(
        (index for batch in data.batches() for index in batch), range(4 * 2 * 36), strict=False
    ):
        stream, number = data.dataset.streams[name].at(place)
        view = stream.view(number)
        assert view.shape == nearest(tuple(SHAPES.values()), *upright_size(view.source.path))
        seen[name][view.source.path.name] += 1
    assert set(seen["subject"].values()) == {24}
    assert len(seen["prior"]) == 9


@pytest.mark.parametrize("hold_out", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_square_photos_are_those_of_a_run_without_buckets_to_the_bit(
    tmp_path: Path, several: bool, hold_out: bool
):
    """Whatever the shapes of the class's images."""
    roots = [
        folder(tmp_path / name, [SQUARE, (24, 24), (40, 40), SQUARE, SQUARE], seed=s)
        for s, name in enumerate("ab")
    ]
    of_class = folder(tmp_path / "class", MIXED, seed=7)
    how = {"batch_size": 2, "hold_out": hold_out, "caption_dropout": 0.3, "prior_caption_dropout": 0.25}
    how |= {"subject_root": roots[0], "prior_root": of_class}
    if several:
        words = {"identifier": "sks", "class_word": "dog", "prior_root": of_class}
        style = {"identifier": "qpv", "class_word": None}
        concepts = [ConceptConfig(root=roots[0], weight=2, **words), ConceptConfig(root=roots[1], **style)]
        how = {k: v for k, v in how.items() if k not in words and k != "subject_root"} | {
            "concepts": concepts
        }
    with_buckets, without = ready(**how), ready(**how | {"buckets": None})
    for start in (0, VALIDATION_START):
        rows = zip(items(with_buckets, 9, start_step=start), items(without, 9, start_step=start), strict=True)
        assert all(equal(one, other) for one, other in rows)
    assert with_buckets.dataset.latent_stats.keys() == without.dataset.latent_stats.keys()


@pytest.mark.parametrize("world_size, batch_size, accumulate", [(1, 1, 4), (2, 2, 1), (2, 1, 2), (1, 2, 2)])
def test_micro_batches_and_ranks_share_a_steps_bucket_and_items(
    folders: dict, world_size: int, batch_size: int, accumulate: int
):
    one = ready(**folders, batch_size=4, caption_dropout=0.3)
    many = ready(**folders, batch_size=batch_size, accumulate=accumulate, caption_dropout=0.3)
    for step in (0, 1, 2, 3, VALIDATION_START, VALIDATION_START + 1):
        shares = [
            items(many, accumulate, rank=rank, world_size=world_size, start_step=step)
            for rank in range(world_size)
        ]
        assert_same(by_number(items(one, 1, start_step=step)), by_number(sum(shares, [])))


def test_resuming_at_a_step_is_the_tail(folders: dict):
    data = ready(**folders, batch_size=2, accumulate=2)
    whole, tail = items(data, 16), items(data, 6, start_step=5)
    assert all(equal(one, other) for one, other in zip(whole[10 * 4 :], tail, strict=True))
    other = items(ready(**folders, batch_size=2, accumulate=2, seed=5), 16)
    assert [shape_of(row) for row in other] != [shape_of(row) for row in whole]


def test_cached_equals_uncached(folders: dict):
    cached, uncached = ready(**folders), ready(**folders, cache_latents=False)
    for one, other in zip(items(cached, 12), items(uncached, 12), strict=True):
        assert torch.equal(one["latent_stats"], encode(other["image"][None])[0])
        assert torch.equal(one["sizes"], other["sizes"])


def test_concepts_have_their_weights_whatever_their_photos_shapes(tmp_path: Path):
    """Two dogs' photos are wide or square, the style's all but one are tall."""
    concepts = [
        ConceptConfig(
            root=folder(tmp_path / "a", [WIDE, WIDE, SQUARE], seed=1), identifier="sks", class_word="dog"
        ),
        ConceptConfig(
            root=folder(tmp_path / "b", [SQUARE], seed=2), identifier="zwx", class_word="dog", weight=2
        ),
        ConceptConfig(
            root=folder(tmp_path / "c", [TALL, TALL, TALL, WIDE], seed=3), identifier="qpv", class_word=None
        ),
    ]
    data = ready(concepts=concepts, num_priors=0)
    masses = {Shape(12, 20): 2 / 3 + 1 / 4, Shape(16, 16): 1 / 3 + 2, Shape(20, 12): 3 / 4}
    steps, photos = 48 * 12, Counter()
    rows = items(data, steps)
    found = Counter(map(shape_of, rows))
    assert found == {shape: pytest.approx(steps * mass / 4) for shape, mass in masses.items()}
    captions = Counter(row["caption"] for row in rows)
    shares = {"a photo of sks dog": 1, "a photo of zwx dog": 2, "a picture in the style of qpv": 1}
    for caption, weight in shares.items():
        assert captions[caption] == pytest.approx(steps * weight / 4, rel=0.03)
    for (name, _, place), _ in zip((i for b in data.batches() for i in b), range(steps), strict=False):
        stream, number = data.dataset.streams[name].at(place)
        photos[stream.view(number).source.sha256] += 1
    assert max(photos.values()) / min(photos.values()) == pytest.approx(8, rel=0.15)  # 2 of one, 1 of four


def test_validation_shows_the_held_out_photo_alone(tmp_path: Path):
    """It is tall, as no other photo, so it is shown in the nearest bucket that is trained on."""
    root = folder(tmp_path / "subject", [WIDE, WIDE, SQUARE, WIDE, SQUARE, TALL], seed=0)
    data = ready(subject_root=root, hold_out=True, num_priors=0, batch_size=2)
    assert data.buckets_in_use.shapes == (Shape(12, 20), Shape(16, 16))
    held_out = data.images.held_out("sks dog")[0]
    views = {view.key for view in data.dataset.streams["subject"].views() if view.source == held_out}
    stats = [data.dataset.latent_stats[key] for key in views]
    for batch in data.val_dataloader():
        assert all(any(torch.equal(row, own) for own in stats) for row in batch["latent_stats"])
    trained = [row for row in items(data, 20)]
    assert not any(
        shape_of(row) == Shape(16, 16) and any(torch.equal(row["latent_stats"], s) for s in stats)
        for row in trained
    )


# --- prior images ------------------------------------------------------------------------------------------


def sets_of(root: Path, counts: dict[Shape, int], prompt: str = "a photo of a dog") -> list[PriorSet]:
    """Sets whose latents are the seed of the image."""
    sets = []
    for shape, count in counts.items():
        width = None if shape.is_square else shape.width
        priors = PriorSet(root, PriorSpec(prompt, "ab", "ddim", 5, 7.5, "", shape.height, 0, width=width))

        def generate(seeds: list[int], shape: Shape = shape) -> list:
            size = shape.height // 2, shape.width // 2
            return [(noise(s, *shape), torch.full((3, *size), float(s))) for s in seeds]

        priors.generate_missing(count, generate, batch_size=4)
        sets.append(priors)
    return sets


def test_prior_images_are_drawn_for_each_bucket_and_shown_in_it(folders: dict, tmp_path: Path):
    counts = {Shape(12, 20): 6, Shape(16, 16): 4, Shape(20, 12): 2}
    priors = sets_of(tmp_path / "priors", counts)
    names = [path.name.rpartition("-")[0] for path in (p.folder for p in priors)]
    assert names == ["a-photo-of-a-dog-12x20", "a-photo-of-a-dog", "a-photo-of-a-dog-20x12"]
    folders["prior_root"] = None
    data = ready(priors, **folders, num_priors=12)
    assert data.buckets_in_use.prior_counts(12) == counts
    seen = {shape: Counter() for shape in counts}
    for row in items(data, 6 * 4):
        if row["stream"] == "prior":
            assert not row["latent_stats"][3:].any()
            seen[shape_of(row)][row["latent_stats"][0, 0, 0].item()] += 1
    assert seen == {shape: Counter({float(k): 2 for k in range(count)}) for shape, count in counts.items()}
    uncached = ready(priors, **folders, num_priors=12, cache_latents=False)
    assert {tuple(row["image"].shape[1:]) for row in items(uncached, 6)} == set(counts)


def test_online_priors_have_the_shape_of_their_step(folders: dict, tmp_path: Path):
    priors = sets_of(tmp_path / "priors", {Shape(12, 20): 6, Shape(16, 16): 4, Shape(20, 12): 2})
    folders["prior_root"] = None
    data = ready(priors, **folders, num_priors=12, online_priors=True, prior_batch_size=2)
    asked = []

    def generators(spec: PriorSpec):
        def generate(seeds: list[int]) -> list:
            asked.append((spec.shape, list(seeds)))
            size = spec.shape.height // 2, spec.shape.width // 2
            return [(noise(s, *spec.shape), torch.full((3, *size), float(s))) for s in seeds]

        return generate

    data.generate = generators
    rows = items(data, 6)
    assert all(len({shape_of(row) for row in rows[3 * n : 3 * n + 3]}) == 1 for n in range(6))
    drawn = {shape: sum((seeds for of, seeds in asked if of == shape), []) for shape, _ in asked}
    assert drawn == {
        Shape(12, 20): list(range(6, 12)),
        Shape(16, 16): list(range(4, 8)),
        Shape(20, 12): [2, 3],
    }
    new = [row for row in rows if row["stream"] == "prior"]
    assert all(row["sizes"].tolist() == [*shape_of(row), 0, 0, *shape_of(row)] for row in new)


# --- masks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", ["center", "random"])
def test_masks_are_cropped_as_their_photos(tmp_path: Path, crop: str):
    """A photo that is its own mask: both then agree in the latents, up to the resampling."""
    root = tmp_path / "subject"
    root.mkdir()
    for k, (height, width) in enumerate([(24, 40), (64, 44), (32, 32)]):
        blob = np.zeros((height, width), np.uint8)
        blob[height // 4 : height // 2 + 3, width // 4 : width // 2 + 5] = 255
        Image.fromarray(blob).convert("RGB").save(root / f"{k}.png")
        Image.fromarray(blob).save(root / f"{k}.mask.png")
    data = ready(subject_root=str(root), num_priors=0, masks=True, crop=crop)
    assert {view.shape for view in data.dataset.masks} == set(SHAPES.values())
    for view, mask in data.dataset.masks.items():
        height, width = view.shape
        assert mask.shape == (1, height // 2, width // 2)
        shown = (view.render()[:1] + 1) / 2
        pooled = torch.nn.functional.avg_pool2d(shown[None], 2)[0]
        assert (pooled - mask).abs().mean() < 0.03
        assert (pooled - mask.flip(-1)).abs().mean() > 0.05 or view.crop_index is not None
    batch = next(iter(data.loader()))
    assert batch["mask"].shape[2:] == batch["latent_stats"].shape[2:]


# --- refusals ----------------------------------------------------------------------------------------------

REFUSED = {
    "no multiple": ({"size": 18}, "size 18 is no multiple of the buckets' unit of 4 pixels.*buckets.unit"),
    "min above size": (
        {"buckets": Buckets(unit=4, min_side=20)},
        "min_side 20 leaves the square of 16 pixels out.*buckets.min_side",
    ),
    "max below size": (
        {"buckets": Buckets(unit=4, max_side=12)},
        "max_side 12 leaves the square of 16 pixels out.*buckets.max_side",
    ),
    "one shape": ({"buckets": Buckets(unit=16)}, "leave only the square.*Choose a smaller unit"),
    "few priors": ({"prior_root": None, "num_priors": 2}, "2 prior images are fewer than the 3 buckets"),
    "no class image": (
        {"prior_root": "squares"},
        "No image of the class is nearest .* bucket of 12 x 20.*squares",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_bucketed_is_refused(folders: dict, tmp_path: Path, monkeypatch, case: str):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "squares", [SQUARE, SQUARE], seed=3)
    change, message = REFUSED[case]
    params = {"class_word": "dog", "size": SIZE, "buckets": Buckets(unit=UNIT), **folders, **change}
    with pytest.raises(UserError, match=message):
        DreamBoothDataModule(**params).check()


def test_a_unit_is_needed(folders: dict):
    with pytest.raises(ValueError, match="data.unit = 64"):
        DreamBoothDataModule(class_word="dog", size=SIZE, buckets=Buckets(), **folders).check()
