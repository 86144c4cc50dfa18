"""What a run has read is kept with it; what changed since is named before it goes on."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from ldm.data.buckets import Buckets, Shape
from ldm.data.dreambooth import DreamBoothDataModule
from ldm.errors import UserError
from ldm.runs.inputs import FILE, keep_inputs, read_inputs
from ldm.runs.job import run_job
from ldm.runs.options import parse
from tests.short_runs import state_of


def photo(path: Path, shade: int) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (24, 24), (shade, 100, 200)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six photos of a subject and two of its class, with captions, and a base model's file."""
    for k in range(6):
        photo(tmp_path / f"rex/{k}.png", 10 * k)
        (tmp_path / f"rex/{k}.txt").write_text(f"a photo of sks dog, number {k}")
    for k in range(2):
        photo(tmp_path / f"dogs/{k}.png", 200 + k)
        (tmp_path / f"dogs/{k}.txt").write_text("a dog")
    (tmp_path / "base.safetensors").write_bytes(b"weights")
    (tmp_path / "heldout.txt").write_text("a photo of {identifier} {class_word} at dawn")
    (tmp_path / "dino").mkdir()
    (tmp_path / "dino/model.safetensors").write_bytes(b"DINO")
    (tmp_path / "run").mkdir()
    return tmp_path


def begin(folder: Path, *, allow: bool = False, hold_out: bool = True, **params) -> DreamBoothDataModule:
    """Begins or resumes the run -> its data."""
    data = DreamBoothDataModule(
        subject_root=str(folder / "rex"),
        class_word="dog",
        size=8,
        hold_out=hold_out,
        **{"captions": True, "prior_root": str(folder / "dogs"), **params},
    )
    data.check()
    base = {"all": folder / "base.safetensors"}
    params = {"prompts": str(folder / "heldout.txt"), "dino": str(folder / "dino"), "clip": "some/clip"}
    nodes = [{"target": "ldm.evaluation.photos.PhotoEvaluation", "params": params}, {"target": "x.Y"}]
    keep_inputs(folder / "run", data, base, evaluations=nodes, allow_change=allow)
    data.attach(encode=lambda images: images.repeat(1, 2, 1, 1), vae_hash="v")
    return data


def held(data: DreamBoothDataModule) -> list[str]:
    data.setup()
    stream = data.dataset.streams["subject"]
    assert not set(stream.held_out) & set(stream.sources)
    kept_back = {photo.sha256 for photo in stream.held_out}
    trained = [photo for photo in data.subject_photos if photo.sha256 not in kept_back]
    assert [photo.path for photo in stream.sources] == [photo.path for photo in trained]
    return [photo.path.name for photo in stream.held_out]


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a photo of another content": (
        lambda f: photo(f / "rex/2.png", 99),
        r"The subject's photos have changed since this run began: changed 2\.png",
    ),
    "a photo more": (lambda f: photo(f / "rex/7.png", 99), r"photos have changed.*: added 7\.png"),
    "a photo less": (lambda f: (f / "rex/1.png").unlink(), r"photos have changed.*: removed 1\.png"),
    "a renamed photo": (
        lambda f: (f / "rex/3.png").rename(f / "rex/9.png"),
        r"photos have changed.*: added 9\.png; removed 3\.png",
    ),
    "another caption": (
        lambda f: (f / "rex/0.txt").write_text("sks dog again"),
        r"The subject's captions have changed since this run began: changed 0\.txt",
    ),
    "a caption less": (lambda f: (f / "rex/5.txt").unlink(), r"captions have changed.*: removed 5\.txt"),
    "a photo of the class": (
        lambda f: photo(f / "dogs/0.png", 99),
        r"The given photos of the class have changed since this run began: changed 0\.png",
    ),
    "a caption of the class": (
        lambda f: (f / "dogs/1.txt").write_text("a cat"),
        r"The captions of the class have changed.*: changed 1\.txt",
    ),
    "the base": (
        lambda f: (f / "base.safetensors").write_bytes(b"other weights"),
        r"The base model's files have changed.*: changed .*base\.safetensors",
    ),
    "a list of prompts": (
        lambda f: (f / "heldout.txt").write_text("at dusk"),
        r"The evaluation's own files have changed.*: changed .*heldout\.txt",
    ),
    "a network of the metrics": (
        lambda f: (f / "dino/model.safetensors").write_bytes(b"DINOv2"),
        r"The evaluation's own files have changed.*: changed .*dino",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_named_and_refused_or_allowed(folder: Path, caplog, change: str):
    begin(folder)
    act, sentence = CHANGES[change]
    act(folder)
    before = (folder / "run" / FILE).read_bytes()
    with pytest.raises(UserError, match=f"{sentence}.*Restore the files, or add --allow_config_change"):
        begin(folder)
    assert (folder / "run" / FILE).read_bytes() == before
    with caplog.at_level(logging.WARNING):
        begin(folder, allow=True)
    assert "goes on: " in caplog.text
    caplog.clear()
    begin(folder)  # what was allowed is what the run has now
    assert not caplog.records


def test_every_kind_has_a_sentence_and_nothing_else_does(folder: Path):
    begin(folder)
    for act, _ in CHANGES.values():
        act(folder)
    with pytest.raises(UserError) as error:
        begin(folder)
    assert error.value.what.count("have changed since this run began") == 6
    for file in ("2.png", "7.png", "9.png", "1.png", "3.png", "0.txt", "5.txt"):
        assert file in error.value.what


def test_files_that_a_run_does_not_read_may_change(folder: Path):
    begin(folder, captions=False, prior_root=None)
    (folder / "rex/0.txt").write_text("anything")
    photo(folder / "dogs/0.png", 99)
    shutil.copy(folder / "rex/3.png", folder / "elsewhere.png")
    begin(folder, captions=False, prior_root=None)


@pytest.mark.parametrize("added", ["0-first.png", "9-last.png"])
def test_the_held_out_photo_stays_wherever_it_sorts(folder: Path, added: str):
    assert held(begin(folder)) == ["5.png"]
    photo(folder / "rex" / added, 77)
    assert held(begin(folder, allow=True)) == ["5.png"]
    (folder / "rex/5.png").rename(folder / "rex/00.png")
    assert held(begin(folder, allow=True)) == ["00.png"]
    (folder / "rex/4.png").unlink()
    assert held(begin(folder, allow=True)) == ["00.png"]


def test_buckets_are_those_of_the_photos_that_are_trained_on(folder: Path):
    """A wide photo is held out, as it was when the run began, though a new one sorts behind it."""
    Image.new("RGB", (96, 24), (9, 100, 200)).save(folder / "rex/5.png")
    how = {"buckets": Buckets(unit=4), "prior_root": None, "num_priors": 0}
    first = begin(folder, **how)
    assert held(first) == ["5.png"] and first.sample_shapes == (Shape(8, 8),)
    photo(folder / "rex/9-last.png", 77)
    again = begin(folder, allow=True, **how)
    assert held(again) == ["5.png"] and again.sample_shapes == (Shape(8, 8),)
    assert again.buckets_in_use.counts() == {Shape(8, 8): 6}


def test_a_new_photo_in_the_place_of_the_held_out_one_is_held_out(folder: Path):
    begin(folder)
    photo(folder / "rex/5.png", 78)
    assert held(begin(folder, allow=True)) == ["5.png"]


def test_no_photo_that_was_trained_on_is_ever_held_out(folder: Path, caplog):
    begin(folder)
    shutil.move(folder / "rex/2.png", folder / "rex/5.png")  # a photo of the training takes its place
    with pytest.raises(UserError, match=r"The photo that was held out, 5\.png, is gone: none is now"):
        begin(folder)
    assert held(begin(folder, allow=True)) == []
    assert held(begin(folder)) == []


def test_a_run_that_began_without_a_hold_out_gets_none(folder: Path, caplog):
    begin(folder, hold_out=False)
    assert held(begin(folder)) == [] and "no photo is held out, because none was" in caplog.text
    begin(folder, hold_out=True)
    (folder / "run" / FILE).unlink()
    assert held(begin(folder)) == ["5.png"]
    assert held(begin(folder, hold_out=False)) == []  # asked for


def test_a_copy_of_the_photo_that_is_held_out_is_not_trained_on_either(folder: Path):
    shutil.copy(folder / "rex/5.png", folder / "rex/0.png")
    assert held(begin(folder)) == ["5.png"]  # `held` looks at what is trained on


def test_what_a_run_did_not_yet_keep_is_not_compared(folder: Path):
    """One that was begun before there were hashes of the evaluation's files goes on, and keeps them now."""
    begin(folder)
    path = folder / "run" / FILE
    kept = json.loads(path.read_text())
    assert set(kept["evaluation"]) == {str(folder / "heldout.txt"), str(folder / "dino")}
    older = {kind: hashes for kind, hashes in kept.items() if kind != "evaluation"}
    path.write_text(json.dumps(older))
    (folder / "heldout.txt").write_text("at dusk")
    begin(folder)
    assert set(json.loads(path.read_text())["evaluation"]) == set(kept["evaluation"])
    (folder / "heldout.txt").write_text("at dawn")
    with pytest.raises(UserError, match="The evaluation's own files have changed since this run began"):
        begin(folder)


def test_hashes_that_cannot_be_read(folder: Path):
    assert read_inputs(folder / "run") is None
    for content in ("{", "[]", '{"x": 1}'):
        (folder / "run" / FILE).write_text(content)
        with pytest.raises(UserError, match="cannot be read.*Remove the file"):
            begin(folder)


def test_a_job_refuses_before_any_work_and_goes_on_when_it_may(words: list[str], subject_folder: Path):
    config = parse([*words, "trainer.max_steps=2"])
    run_job(config)
    kept = json.loads(Path("logs/one", FILE).read_text())
    assert set(kept["photos"]) == {path.name for path in subject_folder.iterdir()} and len(kept["base"]) == 1
    photo(subject_folder / "2.png", 1)
    longer = parse([*words, "trainer.max_steps=3"])
    for resume in ("one", "logs/one/checkpoints/step-00000002.ckpt"):
        with pytest.raises(UserError, match=r"trainer.max_steps: 2 -> 3"):
            run_job(longer, resume)
        with pytest.raises(UserError, match=r"photos have changed.*: changed 2\.png"):
            run_job(config, resume)
    run_job(longer, "one", allow_config_change=True)
    assert state_of(Path("logs/one"), 3)["global_step"] == 3
