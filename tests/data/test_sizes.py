"""What SDXL is told of an item's size: the original's, where its crop lies, and the training size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.buckets import Shape
from ldm.data.captions import Captions
from ldm.data.items import TrainingView, read_source_images

SIZE = 16


@pytest.fixture
def wide(tmp_path: Path) -> TrainingView:
    """A photo of 96 x 64 pixels, each column of its own brightness."""
    ramp = np.broadcast_to(np.arange(96, dtype=np.uint8)[None, :, None] * 2, (64, 96, 3))
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "a.png")
    (photo,) = read_source_images(tmp_path, captions=lambda path: Captions(("",)))
    return TrainingView(photo, Shape.square(SIZE), None, False, seed=1)


def view(of: TrainingView, crop_index: int | None, flip: bool) -> TrainingView:
    return TrainingView(of.source, of.shape, crop_index, flip, of.seed)


def test_a_centre_crop(wide):
    """64 of 96 columns, from 16 on; scaled to 16 pixels that is 4 of 24."""
    assert wide.sizes().tolist() == [64, 96, 0, 4, SIZE, SIZE]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop_index", [None, *range(6)])
def test_the_crop_is_where_the_pixels_are_from(wide, crop_index, flip):
    """The view's pixels are those of the scaled, perhaps mirrored original, from that column on."""
    own = view(wide, crop_index, flip)
    height, width, top, left, target_height, target_width = own.sizes().tolist()
    assert (height, width, top, target_height, target_width) == (64, 96, 0, SIZE, SIZE)
    columns = 2 * (np.arange(24) * 4 + 1.5)  # brightness of the scaled original's columns
    columns = columns[::-1] if flip else columns
    shown = (own.render()[0, 8].numpy() + 1) * 127.5
    assert np.abs(shown[2:-2] - columns[left : left + SIZE][2:-2]).max() < 5  # of 8 a column


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop_index", [None, *range(4)])
@pytest.mark.parametrize("shape", [Shape(16, 20), Shape(16, 32), Shape(20, 12)])
def test_the_crop_of_a_bucket_is_where_the_pixels_are_from(wide, shape, crop_index, flip):
    """Of 96 x 64 pixels; scaled to cover, a column of the target is `scale` columns of the photo."""
    own = TrainingView(wide.source, shape, crop_index, flip, wide.seed)
    height, width, top, left, *target = own.sizes().tolist()
    assert (height, width, *target) == (64, 96, *shape)
    scale = min(64 / shape.height, 96 / shape.width)
    assert 0 <= top <= 64 / scale - shape.height + 0.5 and 0 <= left <= 96 / scale - shape.width + 0.5
    columns = 2 * ((np.arange(shape.width) + left + 0.5) * scale - 0.5)  # brightness, from the left
    if flip:
        columns = 2 * (96 - (np.arange(shape.width) + left + 0.5) * scale - 0.5)
    shown = (own.render()[0, 8].numpy() + 1) * 127.5
    assert np.abs(shown[2:-2] - columns[2:-2]).max() < scale + 2  # half a column of 2 a pixel


def test_crops_differ_and_are_drawn_once(wide):
    lefts = {view(wide, k, False).sizes()[3].item() for k in range(6)}
    assert len(lefts) > 2
    assert torch.equal(view(wide, 3, True).sizes(), view(wide, 3, True).sizes())
