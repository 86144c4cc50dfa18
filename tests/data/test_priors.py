"""Prior sets: exactly what is missing is drawn, whatever happened before."""

import dataclasses
import json
import os
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.buckets import Shape
from ldm.data.priors import PriorSet, PriorSpec
from ldm.diffusion.process import ProcessConfig
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import SPACINGS
from ldm.engine import distributed
from ldm.errors import UserError
from ldm.files import file_sha256
from ldm.runs.sampling import generate_priors, prior_set, prior_sets
from ldm.sampler_nodes import usual_spacing
from ldm.schema import PriorsConfig
from tests.factories import build_module

SPEC = PriorSpec(
    prompt="a photo of a dog",
    base_sha256="ab" * 32,
    sampler="ddim",
    steps=50,
    guidance_scale=7.5,
    negative_prompt="",
    size=8,
    seed=100,
)


def set_of(config: PriorsConfig, **process: object) -> PriorSet:
    about = {"shape": Shape.square(8), "base_sha256": "ab", "device": torch.device("cpu")}
    return prior_set("a dog", config, process=ProcessConfig(**process).build(), **about)


class Painter:
    """Draws a picture and latents from each seed alone; stops with an error after `limit` pictures."""

    def __init__(self, limit: int | None = None):
        self.limit, self.seeds = limit, []

    def __call__(self, seeds: list[int]) -> list[tuple[Image.Image, torch.Tensor]]:
        if self.limit is not None and len(self.seeds) + len(seeds) > self.limit:
            raise RuntimeError("out of memory")
        self.seeds += seeds
        return [(picture(seed), latents(seed)) for seed in seeds]


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8))


def latents(seed: int) -> torch.Tensor:
    return torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(seed))


def assert_complete(priors: PriorSet, count: int) -> None:
    assert priors.missing(count) == []
    for i in range(count):
        with Image.open(priors.image_path(i)) as file:
            np.testing.assert_array_equal(np.asarray(file), np.asarray(picture(100 + i)))
        assert torch.equal(priors.latents(i), latents(100 + i))
    manifest = json.loads((priors.folder / "manifest.json").read_text())
    assert PriorSpec(**manifest["spec"]) == priors.spec
    assert manifest["images"] == [
        {"file": f"{i:04d}.png", "seed": 100 + i, "sha256": file_sha256(priors.image_path(i))}
        for i in range(count)
    ]


def test_draws_in_batches_and_only_once(tmp_path):
    priors, paint, seen = PriorSet(tmp_path, SPEC), Painter(), []
    assert priors.missing(5) == [0, 1, 2, 3, 4]
    assert not priors.folder.exists()  # looking makes nothing
    assert priors.generate_missing(5, paint, batch_size=2, progress=seen.append) == [0, 1, 2, 3, 4]
    assert paint.seeds == [100, 101, 102, 103, 104] and seen == [2, 2, 1]
    assert_complete(priors, 5)
    assert priors.generate_missing(5, paint, batch_size=2) == []
    assert priors.generate_missing(7, paint, batch_size=2) == [5, 6]
    assert_complete(priors, 7)


def test_the_folder_names_prompt_and_spec(tmp_path):
    assert PriorSet(tmp_path, SPEC).folder.name == f"a-photo-of-a-dog-{SPEC.hash}"
    assert len(SPEC.hash) == 12 and int(SPEC.hash, 16) >= 0
    for prompt in ("../../etc/passwd", "犬", "x" * 500, "", "a/b\\c:d\n"):
        folder = PriorSet(tmp_path, dataclasses.replace(SPEC, prompt=prompt)).folder
        assert folder.parent == tmp_path and len(folder.name) <= 53


CHANGES = {
    "prompt": "a photo of a cat",
    "base_sha256": "cd" * 32,
    "sampler": "plms",
    "steps": 51,
    "guidance_scale": 7.0,
    "negative_prompt": "blurry",
    "size": 16,
    "seed": 101,
    "eta": 1.0,
    "precision": "bf16",
    "spacing": "karras",
    "clip_skip": 2,
    "width": 16,
    "levels": "0123456789ab",
    "weights": "bfloat16",
    "padding": [3],
}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(PriorSpec)])
def test_whatever_decides_the_pictures_makes_a_new_set(tmp_path, name):
    PriorSet(tmp_path, SPEC).generate_missing(2, Painter(), batch_size=2)
    changed = dataclasses.replace(SPEC, **{name: CHANGES[name]})
    assert PriorSet(tmp_path, changed).missing(2) == [0, 1]


def test_equal_specs_are_one_set():
    whole, real = (dataclasses.replace(SPEC, guidance_scale=scale) for scale in (7, 7.0))
    assert whole.hash == real.hash != SPEC.hash


def test_a_set_in_fp32_keeps_its_name():
    """Sets that have been drawn keep their names when a setting is new that they have as usual."""
    assert SPEC.hash == "455115ff226c"


def test_a_manifest_that_says_less_is_of_the_same_set(tmp_path):
    """One that was written before there was a spacing lists its images still."""
    priors = PriorSet(tmp_path, SPEC)
    priors.generate_missing(2, Painter(), batch_size=2)
    path = priors.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["spec"]["spacing"]
    path.write_text(json.dumps(manifest))
    assert priors.is_listed(2) and not priors.is_listed(3)


@pytest.mark.parametrize("sampler", [*SAMPLERS, {"target": "mine.heavy_ball"}], ids=str)
def test_the_usual_spacing_is_the_set_that_says_none(tmp_path, sampler):
    def spec(spacing: str | None) -> PriorSpec:
        config = PriorsConfig(folder=str(tmp_path), sampler=sampler, spacing=spacing)
        return set_of(config).spec

    usual = usual_spacing(sampler)
    names = {spacing: spec(spacing).hash for spacing in (None, *SPACINGS)}
    assert names[None] == names[usual] and len(set(names.values())) == len(SPACINGS)


def test_another_noise_process_is_another_set(tmp_path):
    """As when a base's kind of prediction was mistaken: what was drawn so is not trained on."""
    config = PriorsConfig(folder=str(tmp_path), sampler="ddim", steps=5)
    schedules = [
        {},
        {"parameterization": "v"},
        {"parameterization": "v", "zero_terminal_snr": True},
        {"linear_end": 0.02},
        {"beta_schedule": "linear"},
        {"timesteps": 500},
    ]
    folders = [set_of(config, **schedule).folder for schedule in schedules]
    assert len(set(folders)) == len(schedules)
    assert set_of(config, offset_noise=0.1).folder == folders[0]  # of training alone
    assert set_of(config).spec.hash == "7b7b064018ab"  # the same on every machine


def test_images_of_another_set_do_not_count(tmp_path):
    """Files copied over from a set of another base are drawn anew."""
    other = PriorSet(tmp_path, dataclasses.replace(SPEC, base_sha256="cd" * 32))
    other.generate_missing(2, Painter(), batch_size=2)
    priors = PriorSet(tmp_path, SPEC)
    os.rename(other.folder, priors.folder)
    assert priors.missing(2) == [0, 1]
    priors.generate_missing(2, Painter(), batch_size=2)
    os.replace(priors.image_path(0), priors.image_path(1))
    os.replace(priors.folder / "0000.safetensors", priors.folder / "0001.safetensors")
    assert priors.missing(2) == [0, 1]  # image 0 under the name of image 1


def test_a_run_that_dies_while_drawing_is_taken_up(tmp_path):
    priors = PriorSet(tmp_path, SPEC)
    with pytest.raises(RuntimeError):
        priors.generate_missing(7, Painter(limit=4), batch_size=2)
    assert_complete(priors, 4)
    assert priors.missing(7) == [4, 5, 6]
    assert priors.generate_missing(7, Painter(), batch_size=4) == [4, 5, 6]
    assert_complete(priors, 7)


@pytest.mark.parametrize("left", [None, "", "[]", '{"images": 3}', '{"images": [{"file": "0000.png"}]}'])
def test_a_manifest_that_a_killed_process_left_is_rebuilt(tmp_path, left):
    """It died after the last image, or wrote what it knew while another process had generated the rest."""
    priors = PriorSet(tmp_path, SPEC)
    priors.generate_missing(5, Painter(), batch_size=2)
    manifest = priors.folder / "manifest.json"
    manifest.unlink() if left is None else manifest.write_text(left)
    assert generate_priors(None, priors, 5, batch_size=2) == 0
    assert_complete(priors, 5)
    assert generate_priors(None, priors, 3, batch_size=2) == 0  # fewer are wanted: all stay listed
    priors.write_manifest(2)
    assert_complete(priors, 5)


def test_what_another_process_has_generated_stays_listed(tmp_path):
    """It began when the set was empty, and is slower."""
    slow, fast = PriorSet(tmp_path, SPEC), PriorSet(tmp_path, SPEC)

    def generate(seeds: list[int]) -> list:
        fast.generate_missing(5, Painter(), batch_size=5)
        return Painter(limit=2 * (seeds[0] == 100))(seeds)

    with pytest.raises(RuntimeError):
        slow.generate_missing(5, generate, batch_size=2)
    assert_complete(slow, 5)


def test_a_run_that_dies_at_any_file_is_taken_up(tmp_path, monkeypatch):
    """Dies at each rename in turn: every image is then complete or missing, and the rest is drawn."""
    replace = os.replace
    done = [0, 0, 1, 1, 2, 2, 2, 3]  # images after n renames: two files each, and a manifest per batch
    for renames, complete in enumerate(done):
        left = [renames]

        def dying(source, target, left=left):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            replace(source, target)

        priors, paint = PriorSet(tmp_path / str(renames), SPEC), Painter()
        monkeypatch.setattr(os, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            priors.generate_missing(3, Painter(), batch_size=2)
        monkeypatch.setattr(os, "replace", replace)
        priors.generate_missing(3, paint, batch_size=2)
        assert paint.seeds == list(range(100 if complete < 2 else 102, 103)) * (complete < 3), renames
        assert_complete(priors, 3)


@pytest.mark.parametrize("suffix", ["png", "safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "gone"])
def test_damaged_files_are_drawn_anew(tmp_path, suffix, damage):
    priors = PriorSet(tmp_path, SPEC)
    priors.generate_missing(4, Painter(), batch_size=4)
    path = priors.folder / f"0002.{suffix}"
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(
            whole[: len(whole) // 2] if damage == "truncated" else whole[:-6] + b"?" + whole[-5:]
        )
    paint = Painter()
    assert priors.generate_missing(4, paint, batch_size=2) == [2]
    assert paint.seeds == [102, 103]  # a batch as it was
    assert_complete(priors, 4)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("complete", range(6))
def test_a_batch_that_lacks_one_is_generated_as_it_was(tmp_path, complete, world_size):
    """The last bits of an image may depend on how many are made at once."""

    def generate(seeds: list[int]) -> list:
        return [(picture(seed), latents(seed) + len(seeds) * 2**-20) for seed in seeds]

    def generate_in(priors: PriorSet) -> list[list[float]]:
        for rank in range(world_size):
            priors.generate_missing(5, generate, batch_size=3, rank=rank, world_size=world_size)
        return [priors.latents(i).flatten().tolist() for i in range(5)]

    whole = generate_in(PriorSet(tmp_path / "whole", SPEC))
    killed = PriorSet(tmp_path / "killed", SPEC)
    generate_in(killed)
    for i in range(complete, 5):
        killed.image_path(i).unlink()
    assert generate_in(killed) == whole


def test_ranks_share_the_work_and_any_number_may_take_it_up(tmp_path):
    priors = PriorSet(tmp_path, SPEC)
    painters = [Painter(), Painter(limit=2), Painter()]
    for rank, paint in enumerate(painters):
        if rank == 1:
            with pytest.raises(RuntimeError):
                priors.generate_missing(9, paint, batch_size=1, rank=rank, world_size=3)
        else:
            priors.generate_missing(9, paint, batch_size=2, rank=rank, world_size=3)
    assert [paint.seeds for paint in painters] == [[100, 103, 106], [101, 104], [102, 105, 108]]
    assert priors.missing(9) == [7]
    for rank in range(2):
        priors.generate_missing(9, Painter(), batch_size=2, rank=rank, world_size=2)
    priors.write_manifest(9)
    assert_complete(priors, 9)


def test_the_next_batch_is_drawn_while_one_is_written(tmp_path, monkeypatch):
    """Files are made by one thread, in order; a batch is complete before the one after the next is drawn."""
    events, write, lock = [], PriorSet._write, threading.Lock()

    def slow(self, index, picture, latents):
        assert threading.current_thread() is not threading.main_thread()
        assert lock.acquire(blocking=False)
        time.sleep(0.05)
        result = write(self, index, picture, latents)
        events.append(f"wrote {index}")
        lock.release()
        return result

    paint = Painter()

    def draw(seeds):
        events.append(f"draws {seeds[0] - 100}")
        return paint(seeds)

    monkeypatch.setattr(PriorSet, "_write", slow)
    priors = PriorSet(tmp_path, SPEC)
    priors.generate_missing(6, draw, batch_size=2)
    wrote = [int(event.split()[1]) for event in events if event.startswith("wrote")]
    assert wrote == list(range(6))
    assert events.index("draws 2") < events.index("wrote 0")
    assert events.index("wrote 1") < events.index("draws 4") < events.index("wrote 3")
    assert_complete(priors, 6)


def test_a_full_disk_ends_the_drawing(tmp_path, monkeypatch):
    def full(self, index, picture, latents):
        raise OSError(28, "No space left on device")

    priors, paint = PriorSet(tmp_path, SPEC), Painter()
    monkeypatch.setattr(PriorSet, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        priors.generate_missing(20, paint, batch_size=2)
    assert len(paint.seeds) == 4  # the batch that failed, and the one that was drawn meanwhile
    monkeypatch.undo()
    assert priors.missing(20) == list(range(20))


def test_latents_with_nan_are_refused(tmp_path):
    priors = PriorSet(tmp_path, SPEC)
    with pytest.raises(UserError, match="NaN.*prior image 0, seed 100"):
        priors.generate_missing(1, lambda seeds: [(picture(s), latents(s) / 0) for s in seeds], batch_size=1)
    assert priors.missing(1) == [0]


def test_a_painter_that_returns_too_few_is_refused(tmp_path):
    with pytest.raises(ValueError):
        PriorSet(tmp_path, SPEC).generate_missing(2, lambda seeds: [], batch_size=2)


def test_a_place_without_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written.*Choose a folder"):
        PriorSet(tmp_path / "file", SPEC).generate_missing(1, Painter(), batch_size=1)


@pytest.mark.parametrize("counts", [[0, 1], [1, 0]])
def test_processes_agree_on_what_is_missing(tmp_path, monkeypatch, counts):
    """Another run writes the last image between their counts: they still meet equally often."""
    met = []
    monkeypatch.setattr(distributed, "all_gather_object", lambda own: met.append(own) or counts)
    monkeypatch.setattr(distributed, "barrier", lambda: met.append("barrier"))
    priors = PriorSet(tmp_path, SPEC)
    priors.generate_missing(3, Painter(), batch_size=3)  # the count of this process is 0
    assert generate_priors(None, priors, 3, batch_size=2) == 1
    assert met == [0, "barrier"]
    assert_complete(priors, 3)


def test_sets_of_a_run_are_named_by_its_weights_and_padding(tiny_config):
    """bfloat16 networks draw other images than float32 ones, and so do prompts that end otherwise."""

    def spec(padding: int | None, **more: str) -> PriorSpec:
        text = tiny_config["text_encoder"]
        text = text | {"params": text["params"] | {"pad_token_id": padding}}
        module = build_module(tiny_config, text_encoder=text, **more)
        shapes = SimpleNamespace(shapes=[Shape.square(8)])
        data = SimpleNamespace(generated_classes=[SimpleNamespace(prompt="a dog")], buckets_in_use=shapes)
        (found,) = prior_sets(module, data, PriorsConfig(), base_sha256="ab")
        return found.spec

    usual, padded, lean = spec(None), spec(3), spec(None, optimizer="adamw_bf16")
    assert (usual.weights, usual.padding) == ("float32", None)
    assert (padded.padding, lean.weights) == ([3], "bfloat16")
    assert len({usual.hash, padded.hash, lean.hash}) == 3
