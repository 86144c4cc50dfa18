"""From picture files of every make to numbers."""

import io
import logging

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.data import images
from ldm.data.images import (
    alpha_channel,
    fit_image,
    list_images,
    load_image,
    to_image,
    to_tensor,
    upright_size,
)
from ldm.errors import UserError
from ldm.randomness import generator
from tests.data.test_color import rgb_profile

CORNERS = np.array(
    [[[255, 0, 0], [0, 255, 0], [9, 9, 9]], [[0, 0, 255], [255, 255, 255], [99, 0, 99]]], np.uint8
)
UPRIGHT = {  # EXIF orientation -> how the stored pixels become upright (EXIF 2.32, tag 0x0112)
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


def loaded(path) -> np.ndarray:
    return np.asarray(load_image(path))


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(CORNERS).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(loaded(tmp_path / "a.png"), UPRIGHT[orientation](CORNERS))


def test_exif_orientation_of_a_jpeg(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the phone was held upright: stored lying on its left side
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:, :16] = 200
    Image.fromarray(stored).save(tmp_path / "a.jpg", exif=exif, quality=100)
    upright = loaded(tmp_path / "a.jpg")
    assert upright.shape == (32, 16, 3)
    assert upright[:16].min() > 190 and upright[16:].max() < 10


def encoded(kind: str) -> np.ndarray:
    """The corners as pixels of a mode: of RGBA one is transparent."""
    if kind == "RGBA":
        return np.dstack([CORNERS, np.where(np.arange(6).reshape(2, 3) == 1, 0, 255)]).astype(np.uint8)
    return CORNERS if kind == "RGB" else CORNERS[..., 0]


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_a_tiff_is_upright_whatever_its_orientation(tmp_path, orientation, mode, compression):
    """Its pixels, its size from the header alone and its alpha channel."""
    path, stored = tmp_path / "a.tif", encoded(mode)
    Image.fromarray(stored).save(path, tiffinfo={0x0112: orientation}, compression=compression)
    seen = np.where(stored[..., 3:] == 0, 255, stored[..., :3]) if mode == "RGBA" else stored
    seen = UPRIGHT[orientation](np.broadcast_to(seen.reshape(2, 3, -1), CORNERS.shape))
    np.testing.assert_array_equal(loaded(path), seen)
    assert upright_size(path) == seen.shape[:2]
    if mode == "RGBA":
        alpha = UPRIGHT[orientation](stored[..., 3:])[..., 0]
        np.testing.assert_array_equal(np.asarray(alpha_channel(path)), alpha)


def test_a_transparent_level_of_16_bits(tmp_path):
    """That level alone is transparent, not the one that it would be in 8 bits."""
    levels = np.array([[16, 16 * 257, 65535, 0]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png", transparency=16)
    assert loaded(tmp_path / "a.png")[0, :, 0].tolist() == [255, 16, 255, 0]
    assert np.asarray(alpha_channel(tmp_path / "a.png")).tolist() == [[0, 255, 255, 255]]


def test_what_is_no_image_is_called_by_its_name(tmp_path):
    (tmp_path / "0.txt").write_text("a dog")
    with pytest.raises(UserError, match="cannot identify image file '[^<>]*0.txt'"):
        load_image(tmp_path / "0.txt")


def saved(folder, image: Image.Image, suffix: str, **options) -> Image.Image:
    image.save(folder / f"a.{suffix}", **options)
    return load_image(folder / f"a.{suffix}")


def palette(colors: list[int]) -> Image.Image:
    image = Image.new("P", (3, 2), 1)
    image.putpalette(colors)
    return image


@pytest.mark.parametrize(
    "image, suffix, options, expected",
    [
        (Image.new("1", (3, 2), 1), "png", {}, (255, 255, 255)),
        (Image.new("L", (3, 2), 70), "png", {}, (70, 70, 70)),
        (Image.new("L", (3, 2), 70), "png", {"transparency": 70}, (255, 255, 255)),
        (Image.new("LA", (3, 2), (0, 51)), "png", {}, (204, 204, 204)),
        (Image.new("RGBA", (3, 2), (10, 20, 30, 0)), "png", {}, (255, 255, 255)),
        (Image.new("RGBA", (3, 2), (0, 100, 255, 51)), "png", {}, (204, 224, 255)),
        (Image.new("RGBA", (3, 2), (0, 100, 255, 0)), "webp", {"lossless": True}, (255, 255, 255)),
        (Image.new("RGB", (3, 2), (1, 2, 3)), "png", {"transparency": (1, 2, 3)}, (255, 255, 255)),
        (Image.new("RGB", (3, 2), (1, 2, 3)), "webp", {"lossless": True}, (1, 2, 3)),
        (Image.new("RGB", (3, 2), (1, 2, 3)), "bmp", {}, (1, 2, 3)),
        (palette([0, 0, 0, 200, 100, 50]), "png", {}, (200, 100, 50)),
        (palette([0, 0, 0, 200, 100, 50]), "png", {"transparency": 1}, (255, 255, 255)),
        (palette([0, 0, 0, 200, 100, 50]), "gif", {}, (200, 100, 50)),
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "jpg", {"quality": 100}, (255, 0, 0)),
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "tif", {}, (255, 0, 0)),
        (Image.fromarray(np.full((2, 3), 257 * 77, np.uint16)), "png", {}, (77, 77, 77)),
        (Image.fromarray(np.full((2, 3), 65535, np.uint16)), "pgm", {}, (255, 255, 255)),
        (Image.fromarray(np.full((2, 3), 257 * 77, np.uint16)), "tif", {}, (77, 77, 77)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, image, suffix, options, expected):
    rgb = saved(tmp_path, image, suffix, **options)
    assert rgb.mode == "RGB" and rgb.size == image.size
    assert [color for _, color in rgb.getcolors()] == [expected]


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "lime", "blue")]
    for suffix in ("gif", "webp", "png"):
        options = {"lossless": True} if suffix == "webp" else {}
        first = saved(tmp_path, frames[0], suffix, save_all=True, append_images=frames[1:], **options)
        assert first.getcolors() == [(16, (255, 0, 0))], suffix


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_numbers_without_a_known_white_are_refused(tmp_path, dtype):
    with pytest.raises(UserError, match="have no known range"):
        saved(tmp_path, Image.fromarray(np.full((2, 3), 10**6, dtype)), "tif")


def test_what_decodes_counts_whatever_its_name(tmp_path, caplog):
    Image.fromarray(CORNERS).save(tmp_path / "b.png")
    Image.fromarray(CORNERS).save(tmp_path / "a.jpg", format="PNG")
    Image.fromarray(CORNERS).save(tmp_path / "c", format="JPEG")
    Image.fromarray(CORNERS).save(tmp_path / "._b.png")  # macOS leaves such names beside real ones
    (tmp_path / "sub").mkdir()
    for name in (".DS_Store", "Thumbs.db", "b.txt", "notes.txt"):
        (tmp_path / name).write_bytes(b"\0\0\0\1Bud1 no picture")
    with caplog.at_level(logging.INFO):
        assert [path.name for path in list_images(tmp_path)] == ["a.jpg", "b.png", "c"]
    [record] = caplog.records
    for name in (".DS_Store", "._b.png", "Thumbs.db", "notes.txt", "sub"):
        assert name in record.message
    assert "b.txt" not in record.message  # the captions of b.png


def damaged(how: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG" if how == "flipped" else "JPEG")
    whole = buffer.getvalue()
    middle = len(whole) // 2
    return {
        "truncated": whole[:middle],
        "empty": b"",
        "html": b"<html>not found</html>",
        "flipped": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
    }[how]


@pytest.mark.parametrize("how", ["truncated", "empty", "html", "flipped"])
def test_one_damaged_picture_among_five_is_named(tmp_path, caplog, how):
    for k in range(4):
        Image.fromarray(CORNERS).save(tmp_path / f"{k}.png")
    (tmp_path / "broken.jpg").write_bytes(damaged(how))
    with pytest.raises(UserError, match="broken.jpg"):
        list_images(tmp_path)
    assert [path.name for path in list_images(tmp_path, skip_unreadable=True)] == [
        f"{k}.png" for k in range(4)
    ]
    assert "broken.jpg" in caplog.text


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("L", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(UserError, match="too large.*bomb.png"):
        list_images(tmp_path)


@pytest.mark.parametrize("name", ["photo.heic", "photo.HEIF"])
def test_phone_formats_are_refused_rather_than_ignored(tmp_path, name):
    Image.fromarray(CORNERS).save(tmp_path / "a.png")
    (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(UserError, match=f"{name}.*Convert it"):
        list_images(tmp_path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_heic_is_read_upright_in_its_own_colours(tmp_path, orientation):
    """Of any orientation, and with a profile: as a PNG of the same content."""
    exif, big = Image.Exif(), Image.fromarray(CORNERS).resize((64, 48), Image.Resampling.NEAREST)
    exif[0x0112] = orientation
    about = {"exif": exif.tobytes(), "icc_profile": rgb_profile("p3")}
    big.save(tmp_path / "a.png", **about)
    assert "HEIF" in images.formats()
    big.save(tmp_path / "a.heic", format="HEIF", quality=-1, chroma=444, matrix_coefficients=0, **about)
    png, heic = (load_image(tmp_path / f"a.{suffix}") for suffix in ("png", "heic"))
    assert heic.size == png.size and upright_size(tmp_path / "a.heic") == (png.height, png.width)
    assert np.abs(np.asarray(heic, dtype=int) - np.asarray(png, dtype=int)).max() <= 2


def test_without_its_package_heic_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.data.images.formats", lambda: images.FORMATS)
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(UserError, match="HEIC.*pillow-heif, which is not installed.*pip install"):
        list_images(tmp_path)


def test_folders_without_pictures(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        list_images(tmp_path / "absent")
    with pytest.raises(UserError, match="holds no image.*Put photos"):
        list_images(tmp_path)
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="holds 1 unreadable"):
        list_images(tmp_path, skip_unreadable=True)


def test_foreign_programs_are_never_started(tmp_path):
    assert not {"EPS", "WMF"} & set(images.FORMATS)  # Pillow decodes these by calling Ghostscript, GDI


def test_fitting_keeps_the_aspect_ratio_and_the_middle():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = (np.arange(10) * 20)[None, :, None]
    np.testing.assert_array_equal(np.asarray(fit_image(Image.fromarray(wide), 10)), wide[:, 10:20])
    tall = Image.fromarray(wide.transpose(1, 0, 2))
    flipped = np.asarray(fit_image(tall, 10, flip=True))
    np.testing.assert_array_equal(flipped, wide.transpose(1, 0, 2)[10:20, ::-1])


def test_shrinking_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = np.asarray(fit_image(Image.fromarray(stripes), 16)).astype(int)
    assert abs(small[:, 2:-2] - 127).max() <= 2  # without the filter: 0 or 255


def test_random_crops_are_drawn_by_the_generator_and_reach_both_ends():
    ramp = np.repeat(np.arange(40, dtype=np.uint8)[None, :, None], 8, axis=0).repeat(3, axis=2)
    lefts = []
    for k in range(300):
        crop = fit_image(Image.fromarray(ramp), 8, crop="random", generator=generator(0, k, "crop"))
        again = fit_image(Image.fromarray(ramp), 8, crop="random", generator=generator(0, k, "crop"))
        assert crop == again
        lefts.append(np.asarray(crop)[0, 0, 0])
    assert set(lefts) == set(range(33))


def test_tensor_range_and_round_trip():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    pixels = to_tensor(Image.fromarray(levels))
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.float32
    assert pixels.min() == -1 and pixels.max() == 1
    np.testing.assert_array_equal(np.asarray(to_image(pixels)), levels)
    assert np.asarray(to_image(pixels * 3 + 9)).min() == 255  # clamped, not wrapped
    assert to_tensor(Image.fromarray(CORNERS))[:, 1, 0].tolist() == [-1, -1, 1]  # blue at row 1, column 0


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK", "YCbCr", "LAB"]),
    size=st.sampled_from([1, 8, 32]),
    crop=st.sampled_from(["center", "random"]),
)
def test_any_picture_fits(tmp_path, width, height, mode, size, crop):
    suffix = "tif" if mode in ("CMYK", "YCbCr", "LAB") else "png"
    rgb = saved(tmp_path, Image.new(mode, (width, height)), suffix)
    assert (rgb.mode, rgb.size) == ("RGB", (width, height))
    pixels = to_tensor(fit_image(rgb, size, crop=crop, generator=torch.Generator()))
    assert pixels.shape == (3, size, size) and pixels.abs().max() <= 1


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_upright_size_is_that_of_the_decoded_image(tmp_path, orientation):
    photo, exif = Image.new("RGB", (40, 24)), Image.Exif()
    exif[0x0112] = orientation
    photo.save(tmp_path / "a.jpg", exif=exif)
    assert upright_size(tmp_path / "a.jpg") == load_image(tmp_path / "a.jpg").size[::-1]


def test_captions_beside_photos_are_not_called_strays(tmp_path, caplog):
    caplog.set_level("INFO")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    for name in ("a.txt", "b.caption", "c.json", "notes.txt", "a.mov"):
        (tmp_path / name).write_text("x")
    list_images(tmp_path)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == f"{tmp_path}: ignored files that are not images: a.mov, c.json, notes.txt"
