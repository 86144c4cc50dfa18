"""Images that were drawn before are not drawn again, and are the same."""

import inspect
from types import SimpleNamespace

from PIL import Image

from ldm.evaluation.memo import ImageMemo, MemoPipeline
from ldm.pipeline import Text2Image

HOW = {"guidance_scale": 2.0, "steps": 3, "batch_size": 4}


class Counting:
    """Draws a grey level for each prompt and seed, and counts."""

    guidance_base, default_size = None, 8

    def __init__(self):
        self.drawn = []

    def __call__(self, prompts, *, seeds, **how):
        self.drawn += zip(prompts, seeds, strict=True)
        return [
            SimpleNamespace(image=Image.new("RGB", (8, 8), (seed, len(prompt), int(how["guidance_scale"]))))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]


def test_an_image_is_drawn_once_and_given_in_the_order_asked():
    pipeline, memo = Counting(), ImageMemo()
    draw = MemoPipeline(pipeline, memo)
    first = draw(["a", "bb", "a"], seeds=[1, 2, 1], **HOW)
    assert pipeline.drawn == [("a", 1), ("bb", 2)]
    again = MemoPipeline(pipeline, memo)(["bb", "a", "a"], seeds=[2, 1, 9], **HOW)
    assert pipeline.drawn[2:] == [("a", 9)]
    assert [p.image.getpixel((0, 0)) for p in first] == [(1, 1, 2), (2, 2, 2), (1, 1, 2)]
    assert [(p.image.getpixel((0, 0)), p.prompt) for p in again] == [
        ((2, 2, 2), "bb"),
        ((1, 1, 2), "a"),
        ((9, 1, 2), "a"),
    ]


def test_its_defaults_are_the_pipelines_own():
    """So that an evaluation that names neither draws in a run as it does by itself."""
    pipeline = Counting()
    (found,) = MemoPipeline(pipeline, ImageMemo())(["a"], seeds=[1])
    own = inspect.signature(Text2Image.__call__).parameters
    assert found.image.getpixel((0, 0)) == (1, 1, int(own["guidance_scale"].default))
    given = inspect.signature(MemoPipeline.__call__).parameters
    assert all(given[name].default == own[name].default for name in ("guidance_scale", "batch_size"))


def test_other_settings_are_other_images():
    pipeline, memo = Counting(), ImageMemo()
    draw = MemoPipeline(pipeline, memo)
    draw(["a"], seeds=[1], **HOW)
    (other,) = draw(["a"], seeds=[1], **HOW | {"guidance_scale": 4.0})
    assert other.image.getpixel((0, 0)) == (1, 1, 4) and len(pipeline.drawn) == 2
    draw(["a"], seeds=[1], **HOW | {"batch_size": 1})  # how many at a time changes none
    assert len(pipeline.drawn) == 2
    pipeline.guidance_base = object()
    draw(["a"], seeds=[1], **HOW)
    assert len(pipeline.drawn) == 3
    draw(["a"], seeds=[1], **HOW | {"guidance_scale": 1.0})
    pipeline.guidance_base = None
    draw(["a"], seeds=[1], **HOW | {"guidance_scale": 1.0})  # without guidance there is no such prediction
    assert len(pipeline.drawn) == 4


def test_beyond_the_budget_the_oldest_are_forgotten():
    pipeline, memo = Counting(), ImageMemo(budget=3 * 8 * 8 * 3)
    draw = MemoPipeline(pipeline, memo)
    draw(["a"] * 5, seeds=range(5), **HOW)
    assert len(memo.images) == 3 and memo.bytes == 3 * 8 * 8 * 3
    draw(["a"] * 2, seeds=[4, 0], **HOW)
    assert pipeline.drawn[5:] == [("a", 0)]
