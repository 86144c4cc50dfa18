"""What the storybook cannot do is said; of what it can do nothing is."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ldm.data.images import ImageFiles, list_images
from ldm.evaluation.storybook_limits import ALIKE, likeness, reasons_against, unknown_in
from ldm.storybook.judge import Judge
from ldm.storybook.knowledge import unknown_words
from ldm.storybook.subjects import SUBJECTS, new_subject
from ldm.storybook.world import (
    CLASSES,
    CONTEXTS,
    Scene,
    caption,
    draw,
    full_caption,
    same_subject,
    sample_scene,
)

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = REPOSITORY / "ldm/storybook/assets/subjects"
REAL = Path(os.environ.get("DREAMBOOTH_DATA") or REPOSITORY.parent / "shared" / "data" / "dreambooth")


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.from_file()


def photos(subject: Scene, *, size: int = 256, count: int = 4) -> list[Image.Image]:
    places = tuple(CONTEXTS)
    scenes = [same_subject(subject, context=places[3 * k % 8], seed=subject.seed + k) for k in range(count)]
    return [draw(scene, size=size) for scene in scenes]


def compressed(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=60)
    return Image.open(buffer)


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_shipped_subject_raises_no_alarm(judge: Judge, name: str):
    files = ImageFiles(list_images(SHIPPED / name))
    assert reasons_against(files, name, judge) == []


@pytest.mark.parametrize("class_word", CLASSES)
def test_no_drawn_subject_of_any_class_raises_an_alarm(judge: Judge, class_word: str):
    """Neither as it is drawn, nor small, nor compressed by an album."""
    subject = new_subject(class_word, seed=71)
    drawn = photos(subject)
    assert reasons_against(drawn, class_word, judge) == []
    assert reasons_against([compressed(image) for image in drawn[:2]], class_word, judge) == []
    small = [image.resize((64, 64), Image.Resampling.LANCZOS) for image in drawn[2:]]
    assert reasons_against(small, class_word, judge) == []


def others() -> dict[str, list[Image.Image]]:
    """Images that the storybook has not drawn."""
    noise = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    disc = Image.new("RGB", (64, 48), (40, 160, 200))
    ImageDraw.Draw(disc).ellipse((14, 4, 38, 28), fill=(200, 30, 30))
    ramp = Image.linear_gradient("L").resize((128, 128))
    return {
        "soft": [Image.fromarray(noise).resize((256, 256), Image.Resampling.BICUBIC)],
        "disc": [disc],
        "ramp": [Image.merge("RGB", (ramp, ramp.rotate(90), ramp.rotate(180)))],
        "flat": [Image.new("RGB", (64, 64), "white")],
        "noise": [Image.effect_noise((80, 80), 90)],
    }


@pytest.mark.parametrize("kind", others())
def test_other_images_are_told_apart(judge: Judge, kind: str):
    [reason] = reasons_against(others()[kind], "dog", judge)
    assert "not drawn by the storybook" in reason


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no photos under {REAL}: set DREAMBOOTH_DATA")
def test_real_photos_are_told_apart(judge: Judge):
    folders = sorted(path for path in REAL.iterdir() if path.is_dir())
    found = {f.name: likeness(ImageFiles(sorted(f.glob("*.jpg"))[:3]), judge) for f in folders}
    assert max(found.values()) < ALIKE - 0.01, found


@pytest.mark.parametrize("class_word", ["vase", "dogs", "Dog house", "teapot", ""])
def test_a_class_that_it_does_not_know_is_named(judge: Judge, class_word: str):
    [reason] = reasons_against(ImageFiles(sorted((SHIPPED / "dog").glob("*.png"))[:2]), class_word, judge)
    assert repr(class_word) in reason and "dog, cat, bird, car, house, backpack" in reason


def test_every_word_of_its_captions_is_known():
    for k in range(300):
        scene = sample_scene(k)
        for text in (caption(scene, seed=k, rare_word_share=0.0), full_caption(scene)):
            assert unknown_words(text, identifiers=["sks"]) == [], text


@pytest.mark.parametrize(
    "prompt, words",
    [
        ("a photo of sks dog in a spaceship", ["spaceship"]),
        ("a photo of SKS dog on the Moon", []),
        ("sks dog, underwater; in Paris", ["underwater", "paris"]),
        ("a photo of <my-dog> dog at night", []),
        ("", []),
        ("a photo of sksdog", ["sksdog"]),
        ("ein Foto von sks dog", ["ein", "foto", "von"]),
        ("犬", ["犬"]),
    ],
)
def test_words_of_prompts_that_it_has_never_seen(prompt: str, words: list[str]):
    identifier = "<my-dog>" if "<my-dog>" in prompt else "sks"
    assert unknown_words(prompt, identifiers=[identifier]) == words
    said = unknown_in({"samples.prompts.3": prompt}, identifiers=[identifier])
    assert len(said) == bool(words)
    if words:
        assert said[0].startswith("samples.prompts.3: ") and all(repr(word) in said[0] for word in words)
        assert "beach, snow, moon" in said[0]
