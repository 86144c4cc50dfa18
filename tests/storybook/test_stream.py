"""The stream of images for the base: a function of the seed alone, whoever draws it, uint8 without loss."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from ldm.data.images import to_tensor
from ldm.errors import UserError
from ldm.storybook.dataset import SCENES_PER_SEED, StorybookDataModule
from ldm.storybook.stream import StorybookBatches, StorybookStream, to_float
from ldm.storybook.world import CLASSES, draw, sample_scene


def first_batches(count: int, *, start_step: int = 0, **options: object) -> list[dict]:
    stream = StorybookStream(batch_size=4, seed=7, captions_per_image=2, **options)
    stream.start_step = start_step
    return list(itertools.islice(stream.train_dataloader(), count))


def assert_same(a: list[dict], b: list[dict]) -> None:
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        assert (one["caption"], one["stream"]) == (other["caption"], other["stream"])
        for key in ("image", "item"):
            assert torch.equal(one[key], other[key]), key


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_batches_are_the_same_whatever_the_number_of_processes(workers: int):
    assert_same(first_batches(5, num_workers=0), first_batches(5, num_workers=workers))


def test_a_resumed_stream_goes_on_where_it_was():
    assert_same(first_batches(5, num_workers=0)[3:], first_batches(2, num_workers=2, start_step=3))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("module", [StorybookStream, StorybookDataModule])
def test_a_step_of_several_batches_is_resumed_at_its_first(module: type, accumulate: int):
    def items(start_step: int, count: int) -> list[int]:
        data = module(batch_size=2, seed=7, num_workers=0)
        data.trainer = SimpleNamespace(global_rank=0, world_size=1, accumulate_grad_batches=accumulate)
        data.start_step = start_step
        batches = itertools.islice(data.train_dataloader(), count)
        return [item for batch in batches for item in batch["item"].tolist()]

    assert items(2, 2) == items(0, 2 * accumulate + 2)[-4:]


def test_images_are_drawings_of_the_book_and_lose_nothing_as_bytes():
    batch = StorybookBatches(batch_size=6, seed=7, captions_per_image=3)[4]
    assert batch["image"].shape == (2, 3, 64, 64) and batch["image"].dtype == torch.uint8
    for image, k in zip(batch["image"], (8, 9), strict=True):
        assert torch.equal(to_float(image), to_tensor(draw(sample_scene(7 * SCENES_PER_SEED + k))))


def test_items_of_an_image_have_captions_of_their_own_that_are_true_of_it():
    batches = StorybookBatches(batch_size=8, seed=7, captions_per_image=4, caption_dropout=0.0)
    batch = batches[5]
    assert batch["item"].tolist() == list(range(40, 48))
    assert len(set(batch["caption"])) > 4
    for item, text in zip(batch["item"].tolist(), batch["caption"], strict=True):
        named = set(text.split()) & set(CLASSES)
        assert named == {sample_scene(7 * SCENES_PER_SEED + item // 4).class_word}


def test_a_share_of_the_captions_is_empty():
    batches = StorybookBatches(batch_size=1, seed=7, caption_dropout=0.2)
    empty = sum(batches.caption(k) == "" for k in range(1000))
    assert 150 < empty < 250


def test_moments_are_encoded_once_for_all_items_of_an_image():
    stream = StorybookStream(batch_size=6, seed=7, captions_per_image=3, num_workers=0)
    seen = []

    def encode(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return images.mean((2, 3))

    stream.attach(encode=encode)
    batch = stream.on_after_batch_transfer(stream.train_set[0], 0)
    assert "image" not in batch and seen[0].shape == (2, 3, 64, 64)
    assert torch.equal(batch["latent_stats"], encode(seen[0]).repeat_interleave(3, 0))


def test_a_batch_that_cannot_be_shared_out_is_refused():
    with pytest.raises(UserError, match="batch of 6 items cannot hold 4 captions"):
        StorybookStream(batch_size=6, captions_per_image=4)
