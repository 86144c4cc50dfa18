"""Items of a run: the same whatever the order, the workers, the ranks, the micro-batches, the cache."""

import inspect
import logging
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor

from ldm.data.dreambooth import DreamBoothDataModule
from ldm.data.images import to_tensor
from ldm.data.items import ItemBatches
from ldm.data.priors import PriorSet, PriorSpec
from ldm.errors import UserError

SIZE = 8


def encode(images: Tensor) -> Tensor:
    """A VAE's stand-in: [B, 3, H, W] -> [B, 6, H/2, W/2], each item for itself."""
    return torch.cat([images[:, :, ::2, ::2], images[:, :, 1::2, 1::2].abs()], dim=1)


def noise(seed: int, height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def photos(folder: Path, count: int, *, seed: int) -> Path:
    folder.mkdir()
    random = np.random.default_rng(seed)
    for k in range(count):
        height, width = random.integers(SIZE, 4 * SIZE, 2)
        noise(100 * seed + k, height, width).save(folder / f"{k}.png")
    return folder


@pytest.fixture
def folders(tmp_path) -> dict[str, str]:
    return {
        "subject_root": str(photos(tmp_path / "subject", 5, seed=0)),
        "prior_root": str(photos(tmp_path / "class", 7, seed=1)),
    }


@pytest.fixture
def drawn(tmp_path) -> PriorSet:
    """Six prior images, whose latents are not what `encode` would say of their pictures."""
    spec = PriorSpec("a photo of a dog", "ab", "ddim", 5, 7.5, "", SIZE, 0)

    def draw(seeds):
        return [
            (noise(seed, SIZE, SIZE), torch.full((3, SIZE // 2, SIZE // 2), float(seed))) for seed in seeds
        ]

    priors = PriorSet(tmp_path / "priors", spec)
    priors.generate_missing(6, draw, batch_size=6)
    return priors


def ready(priors: PriorSet | None = None, **params) -> DreamBoothDataModule:
    data = DreamBoothDataModule(class_word="dog", **{"size": SIZE, "crop": "random", **params})
    data.check()
    data.attach(encode=encode, vae_hash="v", priors=[priors] if priors else ())
    data.setup()
    return data


def items(data: DreamBoothDataModule, batches: int, **position) -> list[dict]:
    """The items of the first batches, one dict each, in order."""
    rows = []
    for batch in islice(data.loader(**position), batches):
        rows += [{name: values[i] for name, values in batch.items()} for i in range(len(batch["item"]))]
    return rows


def by_number(rows: list[dict]) -> dict[tuple[str, int], dict]:
    numbered = {(row["stream"], int(row["item"])): row for row in rows}
    assert len(numbered) == len(rows), "an item came twice"
    return numbered


def equal(one: dict, other: dict) -> bool:
    same = [torch.equal(one[k], other[k]) if torch.is_tensor(one[k]) else one[k] == other[k] for k in one]
    return one.keys() == other.keys() and all(same)


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    assert all(equal(one[key], other[key]) for key in one)


def test_what_a_batch_holds(folders):
    batch = next(iter(ready(**folders, batch_size=3, prior_batch_size=2).loader()))
    assert (
        batch["latent_stats"].shape == (5, 6, SIZE // 2, SIZE // 2)
        and batch["latent_stats"].dtype == torch.float32
    )
    assert batch["caption"] == ["a photo of sks dog"] * 3 + ["a photo of a dog"] * 2
    assert batch["stream"] == ["subject"] * 3 + ["prior"] * 2
    assert batch["item"].tolist() == [0, 1, 2, 0, 1] and batch["item"].dtype == torch.int64

    batch = next(iter(ready(**folders, batch_size=2, cache_latents=False).loader()))
    assert batch["image"].shape == (4, 3, SIZE, SIZE) and "latent_stats" not in batch


def test_prior_items_hold_the_empty_prompt_in_an_even_share(folders):
    data = ready(**folders, prior_caption_dropout=0.25, batch_size=4)
    batches = islice(data.loader(), 10)
    for batch in batches:
        assert batch["caption"] == ["a photo of sks dog"] * 4 + ["a photo of a dog"] * 3 + [""]
    captions = [
        ready(**folders, prior_caption_dropout=0.3).dataset.streams["prior"].caption(k) for k in range(70)
    ]
    assert [captions[k : k + 10].count("") for k in range(0, 70, 10)] == [3] * 7
    plain, held = ready(**folders), ready(**folders, prior_caption_dropout=1.0)
    for k in range(5):  # the images are those of a run that does not hold it
        assert plain.dataset.streams["prior"].view(k) == held.dataset.streams["prior"].view(k)
        assert plain.dataset.streams["subject"].caption(k) == held.dataset.streams["subject"].caption(k) != ""


def test_without_prior_images_the_subjects_photos_hold_the_empty_prompt(folders):
    folders = folders | {"prior_root": None, "num_priors": 0}
    data = ready(**folders, prior_caption_dropout=0.5, batch_size=2, hold_out=True)
    assert not data.generated_classes and data.priors_show_subject
    batch = next(iter(data.loader()))
    assert batch["caption"] == ["a photo of sks dog"] * 2 + ["a photo of a dog", ""]
    subject, prior = data.dataset.streams["subject"], data.dataset.streams["prior"]
    assert {p.path for p in prior.sources} == {
        p.path for p in subject.sources
    }  # the held-out one is not there
    assert [prior.view(k).flip for k in range(20)] != [subject.view(k).flip for k in range(20)]
    assert ready(**folders).prior_batch_size == 0


def test_differential_output_preservation_shows_photos_under_their_captions_of_the_class(folders):
    photo = Path(folders["subject_root"]) / "2.txt"
    photo.write_text("my old sks dog in the snow")
    folders = folders | {"prior_root": None, "num_priors": 0, "captions": True}
    data = ready(**folders, diff_output_preservation=True)
    assert not data.generated_classes and data.prior_batch_size == 1
    pairs = Counter((p.path.name, *p.captions.texts) for p in data.dataset.streams["prior"].sources)
    assert pairs == {
        **{(f"{k}.png", "a photo of a dog"): 1 for k in (0, 1, 3, 4)},
        ("2.png", "my old dog in the snow"): 1,
    }
    half = ready(**folders, diff_output_preservation=True, prior_caption_dropout=0.5)
    assert [half.dataset.streams["prior"].caption(k) == "" for k in range(6)] == [False, True] * 3
    told = {row["caption"]: row["class_caption"] for row in items(data, 12)}
    assert told == {
        "a photo of sks dog": "a photo of a dog",
        "my old sks dog in the snow": "my old dog in the snow",
        "a photo of a dog": "a photo of a dog",
        "my old dog in the snow": "my old dog in the snow",
    }


def test_differential_output_preservation_and_prior_images_exclude_each_other(folders):
    own = {"subject_root": folders["subject_root"], "diff_output_preservation": True}
    for more in ({"num_priors": 3}, {"prior_root": folders["prior_root"]}, {"prior_batch_size": 0}):
        with pytest.raises(UserError, match="place of prior images.*num_priors=0"):
            ready(**{"num_priors": 0, **own, **more})


@pytest.mark.parametrize("seed", [0, 1])
def test_an_item_is_a_function_of_seed_and_number(folders, seed):
    data, again = (ready(**folders, seed=seed).dataset for _ in range(2))
    order = np.random.default_rng(0).permutation(40)
    for k in order:
        for stream in ("prior", "subject"):
            assert equal(data[stream, int(k)], again[stream, int(k)])


def test_seeds_and_parts_draw_apart(folders):
    def numbers(data, stream):
        views = [data.dataset.streams[stream].view(k) for k in range(60)]
        return [(view.source.path.name, view.crop_index, view.flip) for view in views]

    one, other = ready(**folders, seed=0), ready(**folders, seed=1)
    assert numbers(one, "subject") != numbers(other, "subject")
    same = ready(**folders | {"prior_root": None, "num_priors": 0}, seed=0)
    assert numbers(one, "subject") == numbers(same, "subject")  # the subject does not feel the prior
    flips = [[flip for *_, flip in numbers(one, stream)] for stream in ("subject", "prior")]
    assert flips[0] != flips[1]


def test_every_photo_comes_once_in_a_pass_in_ever_new_order(folders):
    stream = ready(**folders).dataset.streams["subject"]
    passes = [[stream.view(5 * n + i).source.path.name for i in range(5)] for n in range(20)]
    assert all(sorted(names) == [f"{k}.png" for k in range(5)] for names in passes)
    assert len({tuple(names) for names in passes}) > 10


def test_shares_of_flips_crops_and_empty_captions(folders):
    stream = ready(**folders, caption_dropout=0.25, crop_variants=4).dataset.streams["subject"]
    n = 2000
    views, captions = [stream.view(k) for k in range(n)], [stream.caption(k) for k in range(n)]
    assert abs(sum(view.flip for view in views) / n - 0.5) < 4 * (0.25 / n) ** 0.5  # four sigma
    assert abs(captions.count("") / n - 0.25) < 4 * (0.1875 / n) ** 0.5
    counts = Counter(view.crop_index for view in views)
    assert set(counts) == {0, 1, 2, 3} and min(counts.values()) > 400
    assert {
        ready(**folders, caption_dropout=1.0).dataset[stream, 3]["caption"] for stream in ("prior", "subject")
    } == {""}


@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_mirrored_view_shows_the_same_crop(folders, crop):
    views = ready(**folders, crop=crop, crop_variants=3).dataset.streams["subject"].views()
    assert len(views) == 5 * 2 * (3 if crop == "random" else 1)
    assert len({view.key for view in views}) == len(views)
    for plain, mirrored in zip(views[::2], views[1::2], strict=True):
        assert torch.equal(plain.render().flip(-1), mirrored.render())


@pytest.mark.parametrize("crop", ["center", "random"])
def test_cached_equals_uncached(folders, crop):
    cached = ready(**folders, crop=crop, batch_size=2)
    uncached = ready(**folders, crop=crop, batch_size=2, cache_latents=False)
    for one, other in zip(items(cached, 25), items(uncached, 25), strict=True):
        assert torch.equal(one["latent_stats"], encode(other["image"][None])[0])
        assert {k: one[k] for k in ("caption", "item")} == {k: other[k] for k in ("caption", "item")}


def test_a_cache_on_disk_equals_one_in_memory(folders, tmp_path):
    cache = {"cache_root": str(tmp_path / "cache")}
    first = items(ready(**folders, **cache), 20)
    second = DreamBoothDataModule(class_word="dog", size=SIZE, crop="random", **folders, **cache)
    second.attach(encode=lambda images: pytest.fail("encoded again"), vae_hash="v")
    second.setup()
    for one, other, memory in zip(first, items(second, 20), items(ready(**folders), 20), strict=True):
        assert equal(one, other) and equal(one, memory)


def test_renaming_photos_changes_no_crop(folders, tmp_path):
    before = ready(**folders).dataset.latent_stats
    for path in (tmp_path / "subject").iterdir():
        path.rename(path.with_name(f"renamed {path.name}"))
    after = ready(**folders).dataset.latent_stats
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_items(folders, workers):
    alone = items(ready(**folders, cache_latents=False, batch_size=2), 6)
    helped = items(ready(**folders, cache_latents=False, batch_size=2, num_workers=workers), 6)
    assert all(equal(one, other) for one, other in zip(alone, helped, strict=True))


def test_loading_leaves_the_global_generator_alone(folders):
    data = ready(**folders)
    state = torch.random.get_rng_state()
    items(data, 3)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_resuming_at_a_step_is_the_tail_of_the_stream(folders, accumulate):
    data = ready(**folders, batch_size=2, accumulate=accumulate)
    whole, tail = items(data, 8 * accumulate), items(data, 3 * accumulate, start_step=5)
    assert all(equal(one, other) for one, other in zip(whole[5 * accumulate * 4 :], tail, strict=True))
    data.start_step = 5
    batch = next(iter(data.train_dataloader()))
    assert batch["item"].tolist() == [10 * accumulate, 10 * accumulate + 1] * 2


@pytest.mark.parametrize("batch_size, accumulate", [(1, 4), (2, 2)])
def test_accumulation_sees_the_items_of_one_large_batch(folders, batch_size, accumulate):
    large = ready(**folders, batch_size=4)
    small = ready(**folders, batch_size=batch_size, accumulate=accumulate)
    for step in range(3):
        one, other = items(large, 1, start_step=step), items(small, accumulate, start_step=step)
        assert_same(by_number(one), by_number(other))


@pytest.mark.parametrize("world_size, batch_size, accumulate", [(2, 1, 1), (2, 1, 2), (4, 1, 1)])
def test_ranks_share_the_items_of_one_process(folders, world_size, batch_size, accumulate):
    one = ready(**folders, batch_size=batch_size * world_size * accumulate)
    many = ready(**folders, batch_size=batch_size, accumulate=accumulate)
    for step in range(3):
        shares = [
            items(many, accumulate, rank=rank, world_size=world_size, start_step=step)
            for rank in range(world_size)
        ]
        assert_same(by_number(items(one, 1, start_step=step)), by_number(sum(shares, [])))


def test_validation_items_never_change_and_never_train(folders):
    data = ready(**folders, batch_size=2, validation_batches=3)
    first, again = list(data.val_dataloader()), list(data.val_dataloader())
    assert [b["item"].tolist() for b in first] == [b["item"].tolist() for b in again]
    assert all(torch.equal(b["latent_stats"], c["latent_stats"]) for b, c in zip(first, again, strict=True))
    assert len(first) == 3
    assert all(b["stream"] == ["subject", "subject", "prior", "prior"] for b in first)
    assert min(int(b["item"].min()) for b in first) > 10**9


def test_item_numbers_follow_the_formula():
    batches = ItemBatches(batch_size=2, prior_batch_size=1, accumulate=3, rank=1, world_size=2, start_step=7)
    for j, batch in enumerate(islice(batches, 6)):
        n, j = 7 + j // 3, j % 3
        subject = [("subject", n * 12 + (j * 2 + 1) * 2 + i) for i in range(2)]
        assert batch == [*subject, ("prior", n * 6 + j * 2 + 1)]


def test_drawn_priors_are_used_straight_from_the_sampler(folders, drawn):
    data = ready(drawn, **folders | {"prior_root": None}, num_priors=6, batch_size=6)
    assert data.generated_classes
    rows = [row for row in items(data, 2) if row["stream"] == "prior"]
    means = [row["latent_stats"][:3].unique().item() for row in rows]
    assert sorted(means[:6]) == sorted(means[6:]) == [0, 1, 2, 3, 4, 5]
    # No spread: sampling gives the latents back
    assert all(not row["latent_stats"][3:].any() for row in rows)
    assert {row["caption"] for row in rows} == {"a photo of a dog"}

    uncached = ready(drawn, **folders | {"prior_root": None}, num_priors=6, cache_latents=False)
    pictures = [to_tensor(Image.open(drawn.image_path(i))) for i in range(6)]
    images = [row["image"] for row in items(uncached, 6) if row["stream"] == "prior"]
    assert all(any(torch.equal(image, picture) for picture in pictures) for image in images)  # never mirrored


def test_missing_priors_stop_the_run(folders, drawn):
    drawn.image_path(3).unlink()
    with pytest.raises(UserError, match="1 of 6 prior images are missing.*generate_priors"):
        ready(drawn, **folders | {"prior_root": None}, num_priors=6)


@pytest.mark.parametrize("other", [{"size": 2 * SIZE}, {"prior_prompt": "a painting of a {class_word}"}])
def test_priors_of_another_prompt_or_size_are_never_used(folders, drawn, other):
    with pytest.raises(ValueError, match="were generated for 'a photo of a dog' at 8 x 8 pixels"):
        ready(drawn, **folders | {"prior_root": None, "num_priors": 6, **other})


@pytest.mark.parametrize("without", [{"num_priors": 0}, {"prior_batch_size": 0}])
def test_training_without_priors(folders, without):
    data = ready(subject_root=folders["subject_root"], batch_size=2, **without)
    assert not data.generated_classes
    assert not any(row["stream"] == "prior" for row in items(data, 3))


def test_captions_beside_the_photos(folders):
    subject = Path(folders["subject_root"])
    (subject / "2.txt").write_text("{identifier} {class_word} asleep")
    data = ready(**folders, captions=True, batch_size=5)
    captions = [row["caption"] for row in items(data, 1)[:5]]
    assert Counter(captions) == {"a photo of sks dog": 4, "sks dog asleep": 1}
    assert {row["caption"] for row in items(ready(**folders), 5)} == {
        "a photo of sks dog",
        "a photo of a dog",
    }
    (subject / "2.txt").write_text("a dog asleep")
    with pytest.raises(UserError, match='"sks" is missing.*2.txt'):
        ready(**folders, captions=True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"subject_root": "absent"}, "no such folder.*absent"),
        ({"prior_root": "absent"}, "no such folder.*absent"),
        ({"subject_prompt": "a {class_word}"}, "missing.*subject_prompt"),
        ({"size": 0}, "size is 0"),
        ({"size": 12}, "multiple of 8; 16 is near"),
        ({"batch_size": 0}, "batch_size is 0.*at least 1"),
        ({"prior_batch_size": -1}, "prior_batch_size is -1"),
        ({"num_priors": -1}, "num_priors is -1"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"crop": "random", "crop_variants": 0}, "crop_variants"),
        ({"caption_dropout": 1.5}, "caption_dropout"),
        ({"prior_caption_dropout": -0.1}, "prior_caption_dropout"),
        ({"prior_caption_dropout": 0.5, "prior_batch_size": 0}, "prior_caption_dropout"),
        ({"prior_root": None, "num_priors": 0, "prior_batch_size": 1}, "prior_batch_size.*Raise num_priors"),
    ],
)
def test_check_finds_what_is_wrong(folders, change, message):
    with pytest.raises(UserError, match=message):
        DreamBoothDataModule(**{**folders, "class_word": "dog", "size": 8, **change}).check(size_multiple=8)


def test_subject_and_prior_are_never_one_folder(folders):
    root = folders["subject_root"]
    data = DreamBoothDataModule(
        subject_root=root, prior_root=root + "/../subject", class_word="dog", size=SIZE
    )
    with pytest.raises(UserError, match="same folder"):
        data.check()


def test_check_warns_of_small_photos(folders, caplog):
    Image.new("RGB", (SIZE - 1, 99)).save(Path(folders["subject_root"]) / "tiny.png")
    with caplog.at_level(logging.WARNING):
        ready(**folders)
    assert "enlarged to 8 pixels: tiny.png" in caplog.text


def test_one_damaged_photo_can_be_left_out(folders):
    path = Path(folders["subject_root"]) / "2.png"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="2.png"):
        ready(**folders)
    names = {p.path.name for p in ready(**folders, skip_unreadable=True).subject_photos}
    assert names == {"0.png", "1.png", "3.png", "4.png"}


def test_every_parameter_is_documented():
    text = DreamBoothDataModule.__doc__.split("Args:")[1]
    names = set(inspect.signature(DreamBoothDataModule).parameters) - {"seed"}
    assert {name for name in names if name not in text} == set()


class Recorder(pl.LightningModule):
    """Trains one number and notes the items of every step."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []

    def training_step(self, batch: dict, _: int) -> Tensor:
        self.seen.append(batch["item"].tolist())
        return self.weight * batch["latent_stats"].mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightning_takes_the_endless_stream(folders, tmp_path):
    data, model = ready(**folders, batch_size=2, accumulate=2), Recorder()
    data.start_step = 3
    trainer = pl.Trainer(
        max_steps=2,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, data)
    assert model.seen == [[k, k + 1] * 2 for k in (12, 14, 16, 18)]


def test_a_photo_that_is_held_out_validates_and_never_trains(folders):
    data = ready(subject_root=folders["subject_root"], num_priors=0, hold_out=True, validation_batches=3)
    names = [Path(photo.path).name for photo in data.subject_photos]
    held, stream = names[-1], data.dataset.streams["subject"]
    trained = {stream.view(item).source.path.name for item in range(200)}
    assert trained == set(names) - {held}
    validated = [int(item) for batch in data.val_dataloader() for item in batch["item"]]
    assert {stream.view(item).source.path.name for item in validated} == {held}
    few = ready(subject_root=folders["prior_root"], num_priors=0, hold_out=True)
    assert len(few.dataset.streams["subject"].sources) == 6  # of seven


def test_a_copy_of_the_photo_that_is_held_out_is_not_trained_on_either(folders, tmp_path):
    """Under another name, as a browser gives it: the validation loss would be of a trained photo."""
    photos = Path(shutil.copytree(folders["subject_root"], tmp_path / "copies"))
    last = sorted(photos.iterdir())[-1]
    shutil.copy(last, photos / f"0 ({last.stem}){last.suffix}")
    stream = ready(subject_root=str(photos), num_priors=0, hold_out=True).dataset.streams["subject"]
    trained, held = ({s.sha256 for s in group} for group in (stream.sources, stream.held_out))
    assert len(held) == 1 and trained and not trained & held
    for path in photos.iterdir():
        shutil.copy(last, path) if path != last else None  # all of them are one
    stream = ready(subject_root=str(photos), num_priors=0, hold_out=True).dataset.streams["subject"]
    assert stream.held_out == () and stream.sources


@pytest.mark.parametrize("online", [False, True])
def test_online_priors_are_new_images_for_every_item(folders, drawn, online):
    asked = []

    def draw(seeds):
        asked.append(list(seeds))
        return [
            (noise(seed, SIZE, SIZE), torch.full((3, SIZE // 2, SIZE // 2), float(seed))) for seed in seeds
        ]

    def rows() -> dict:
        data = ready(priors=drawn, subject_root=folders["subject_root"], num_priors=6, batch_size=2,
                     online_priors=online)  # fmt: skip
        data.generate = lambda spec: draw
        validation = [batch for batch in data.val_dataloader()]
        assert {float(b["latent_stats"][-1, 0, 0, 0]) for b in validation} <= set(map(float, range(6)))
        return by_number(items(data, 3))

    first = rows()
    shown = [float(first["prior", k]["latent_stats"][0, 0, 0]) for k in range(6)]
    if not online:
        assert set(shown) <= set(map(float, range(6))) and asked == []
        return
    assert shown == [6.0, 7.0, 8.0, 9.0, 10.0, 11.0]
    assert asked == [[6, 7], [8, 9], [10, 11]]
    (drawn.folder / "0009.safetensors").unlink()  # killed in between: what was drawn together is drawn again
    assert all(equal(first[key], row) for key, row in rows().items())
    assert asked[3:] == [[8, 9]]
