"""The storybook's world: pure functions of a seed, captions that are true."""

from dataclasses import replace

import numpy as np
import pytest

from ldm.data.images import list_images
from ldm.storybook import world
from ldm.storybook.subjects import SUBJECTS, write_subject
from ldm.storybook.tokenizer import train_tokenizer
from ldm.storybook.world import (
    ATTRIBUTES,
    CLASSES,
    CONTEXTS,
    PALETTE,
    caption,
    draw,
    draw_mask,
    full_caption,
    same_subject,
    sample_scene,
)


def test_a_drawing_is_a_function_of_its_seed():
    pictures = [np.asarray(draw(sample_scene(seed))) for seed in (3, 3, 4)]
    assert pictures[0].shape == (64, 64, 3)
    assert (pictures[0] == pictures[1]).all() and (pictures[0] != pictures[2]).any()


def test_attributes_cover_their_values_and_accent_and_band_differ_from_the_color():
    scenes = [sample_scene(seed) for seed in range(400)]
    for name, values in ATTRIBUTES.items():
        assert {scene.labels()[name] for scene in scenes} == set(range(len(values)))
    assert all(scene.color not in (scene.accent, scene.band) for scene in scenes)


@pytest.mark.parametrize("seed", range(40))
def test_captions_name_the_class_and_no_other_color_or_place(seed: int):
    scene = sample_scene(seed)
    text = caption(scene, seed=seed, rare_word_share=0.0)
    assert scene.class_word in text.split()
    assert set(PALETTE) & set(text.split()) <= {scene.color, scene.accent, scene.band}
    assert all(phrase not in text for place, phrase in CONTEXTS.items() if place != scene.context)
    assert CONTEXTS[scene.context] in full_caption(scene)


def test_a_rare_word_stands_for_all_description():
    scene = sample_scene(1)
    words = caption(scene, seed=1, rare_word_share=1.0).split()
    assert len(words[words.index(scene.class_word) - 1]) == 3 and not set(words) & set(PALETTE)


@pytest.mark.parametrize("class_word", CLASSES)
def test_a_mask_is_where_the_figure_is(class_word: str, monkeypatch: pytest.MonkeyPatch):
    """Around it the drawing is the place's alone, in it whatever the place is: no figure is magenta."""
    places = dict.fromkeys(CONTEXTS, lambda brush, rng: brush.rect(-1, -1, 65, 65, (255, 0, 255), ink=False))
    monkeypatch.setattr(world, "PLACES", places)
    monkeypatch.setattr(world, "SHADOWS", dict.fromkeys(CONTEXTS, (255, 0, 255)))
    for seed in range(12):
        scene = replace(sample_scene(seed), class_word=class_word)
        for size in (256, 64):
            picture, mask = np.asarray(draw(scene, size=size)), np.asarray(draw_mask(scene, size=size))
            assert ((picture == (255, 0, 255)).all(-1) == (mask == 0)).all()
            assert size == 64 or set(np.unique(mask)) == {0, 255}


def test_masks_lie_beside_photos_on_request(tmp_path):
    plain, masked = (write_subject(tmp_path / name, SUBJECTS["car"], masks=name == "b") for name in "ab")
    assert [p.read_bytes() for p in plain] == [p.read_bytes() for p in masked]
    assert len(list((tmp_path / "a").iterdir())) == 5
    assert {p.name for p in (tmp_path / "b").iterdir()} == {
        f"0{k}{ending}" for k in range(5) for ending in (".png", ".mask.png")
    }
    assert [p.name for p in list_images(tmp_path / "b")] == [p.name for p in plain]


def test_the_main_color_fills_the_figure_in_every_place():
    scene = SUBJECTS["dog"]
    for place in CONTEXTS:
        picture = np.asarray(draw(same_subject(scene, context=place, seed=5))).astype(int)
        near = (abs(picture - PALETTE["orange"]).sum(-1) < 40).mean()
        assert 0.04 < near < 0.4


def test_subject_photos_and_tokenizer_are_written_the_same_each_time(tmp_path):
    first, again = (write_subject(tmp_path / name, SUBJECTS["car"]) for name in "ab")
    assert len(first) == 5 and [p.read_bytes() for p in first] == [p.read_bytes() for p in again]
    assert train_tokenizer(tmp_path / "a", captions=300) == train_tokenizer(tmp_path / "b", captions=300)
    assert (tmp_path / "a" / "vocab.json").read_bytes() == (tmp_path / "b" / "vocab.json").read_bytes()
