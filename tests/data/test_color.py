"""Colour profiles, built here by the ICC's specification: what a camera meant is what is trained on."""

import io
import logging
import struct
from itertools import product

import numpy as np
import pytest
from PIL import Image, ImageCms

from ldm.data.images import load_image

D65, D50 = np.array([0.95047, 1.0, 1.08883]), np.array([0.9642, 1.0, 0.8249])
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
PRIMARIES = {  # chromaticities of red, green, blue
    "srgb": [(0.64, 0.33), (0.30, 0.60), (0.15, 0.06)],
    "p3": [(0.68, 0.32), (0.265, 0.69), (0.15, 0.06)],
    "adobe": [(0.64, 0.33), (0.21, 0.71), (0.15, 0.06)],
}
ADOBE_GAMMA = 563 / 256
COLORS = [(200, 60, 40), (120, 200, 90), (30, 80, 160), (128, 128, 128), (250, 250, 250), (90, 40, 120)]


def matrix(space: str) -> np.ndarray:
    """Linear RGB -> XYZ under D65."""
    columns = np.array([(x / y, 1.0, (1 - x - y) / y) for x, y in PRIMARIES[space]]).T
    return columns * np.linalg.solve(columns, D65)


def linear(levels: np.ndarray) -> np.ndarray:
    x = np.asarray(levels) / 255
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def encoded(x: np.ndarray) -> np.ndarray:
    x = np.clip(x, 0, 1)
    return 255 * np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)


def stored(srgb: tuple, space: str) -> tuple:
    """The levels by which a file in that space says an sRGB colour."""
    values = np.linalg.solve(matrix(space), matrix("srgb") @ linear(srgb))
    levels = 255 * np.clip(values, 0, 1) ** (1 / ADOBE_GAMMA) if space == "adobe" else encoded(values)
    return tuple(int(level) for level in np.round(levels))


def s15(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def curve(gamma: float | None) -> bytes:
    """A "curv" tag of one gamma, or of 4096 points of sRGB's."""
    if gamma is not None:
        return struct.pack(">4sIIH", b"curv", 0, 1, round(gamma * 256))
    points = np.round(65535 * linear(np.linspace(0, 255, 4096))).astype(">u2")
    return struct.pack(">4sII", b"curv", 0, len(points)) + points.tobytes()


def icc(space: bytes, tags: dict[bytes, bytes], *, pcs: bytes = b"XYZ ", kind: bytes = b"mntr") -> bytes:
    """A version 2 profile (ICC.1:2001-04, sections 6.1 and 6.2)."""
    text = struct.pack(">4sII", b"desc", 0, 2) + b"x\0" + bytes(78 + 1)
    tags = {b"desc": text, b"wtpt": b"XYZ \0\0\0\0" + s15(*D50), **tags}
    place, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += struct.pack(">4sII", name, place + len(body), len(data))
        body += data
    size = place + len(body)
    header = struct.pack(">I4sI4s4s4s", size, bytes(4), 0x02100000, kind, space, pcs)
    header += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + s15(*D50)
    return header + bytes(128 - len(header)) + struct.pack(">I", len(tags)) + table + body


def rgb_profile(space: str) -> bytes:
    cone = np.diag((BRADFORD @ D50) / (BRADFORD @ D65))
    columns = (np.linalg.inv(BRADFORD) @ cone @ BRADFORD @ matrix(space)).T
    tags = {k: b"XYZ \0\0\0\0" + s15(*c) for k, c in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)}
    trc = curve(ADOBE_GAMMA if space == "adobe" else None)
    return icc(b"RGB ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), trc))


def grey_profile(gamma: float) -> bytes:
    return icc(b"GRAY", {b"kTRC": curve(gamma)})


def cmyk_profile(lab: dict[tuple, tuple]) -> bytes:
    """A profile whose corners have these Lab values: an 8-bit table of two points a side (section 6.5.8)."""
    levels = bytes(range(256))
    corners = [lab.get(corner, (0, 0, 0)) for corner in product((0, 1), repeat=4)]
    cells = bytes(int(v) for L, a, b in corners for v in (round(L * 2.55), a + 128, b + 128))
    table = struct.pack(">4sIBBBx", b"mft1", 0, 4, 3, 2) + s15(1, 0, 0, 0, 1, 0, 0, 0, 1)
    return icc(b"CMYK", {b"A2B0": table + levels * 4 + cells + levels * 3}, pcs=b"Lab ", kind=b"prtr")


def read(tmp_path, image: Image.Image, suffix: str = "png", **options) -> tuple:
    path = tmp_path / f"a.{suffix}"
    image.save(path, **options)
    loaded = load_image(path)
    assert loaded.mode == "RGB"
    return np.asarray(loaded).reshape(-1, 3).mean(0)


@pytest.mark.parametrize("space", ["p3", "adobe"])
@pytest.mark.parametrize("color", COLORS, ids=str)
def test_a_color_of_another_space_is_the_color_that_was_meant(tmp_path, space, color):
    image = Image.new("RGB", (16, 16), stored(color, space))
    for suffix, options in (("png", {}), ("jpg", {"quality": 100, "subsampling": 0}), ("tif", {})):
        found = read(tmp_path, image, suffix, icc_profile=rgb_profile(space), **options)
        assert np.abs(found - color).max() <= 2, (suffix, found)


def test_the_red_of_a_phone(tmp_path):
    assert stored((200, 60, 40), "p3") == (185, 71, 50)  # as other implementations of Display P3 have it
    found = read(tmp_path, Image.new("RGB", (8, 8), (185, 71, 50)), icc_profile=rgb_profile("p3"))
    assert np.abs(found - (200, 60, 40)).max() <= 1


def test_srgb_stays_to_the_bit(tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for profile in (rgb_profile("srgb"), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()):
        Image.fromarray(levels).save(tmp_path / "a.png", icc_profile=profile)
        np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.png")), levels)


@pytest.mark.parametrize("mode", ["L", "LA", "I;16", "1"])
def test_grey_of_another_gamma(tmp_path, mode):
    level = 255 if mode == "1" else 100
    image = {
        "1": lambda: Image.new("1", (4, 4), 1),
        "L": lambda: Image.new("L", (4, 4), level),
        "LA": lambda: Image.new("LA", (4, 4), (level, 255)),
        "I;16": lambda: Image.fromarray(np.full((4, 4), 257 * level, np.uint16)),
    }[mode]()
    found = read(tmp_path, image, icc_profile=grey_profile(1.0))
    assert np.abs(found - encoded(np.array(level / 255))).max() <= 1


def test_grey_with_a_profile_of_three_channels(tmp_path):
    found = read(tmp_path, Image.new("L", (4, 4), 100), icc_profile=rgb_profile("adobe"))
    assert np.abs(found - encoded(np.array((100 / 255) ** ADOBE_GAMMA))).max() <= 1


def test_transparency_and_palettes_keep_their_place(tmp_path):
    there = stored((200, 60, 40), "p3")
    image = Image.new("RGBA", (4, 2), (*there, 255))
    image.paste((*there, 0), (2, 0, 4, 2))
    image.save(tmp_path / "a.png", icc_profile=rgb_profile("p3"))
    loaded = np.asarray(load_image(tmp_path / "a.png")).astype(int)
    assert np.abs(loaded[:, :2] - (200, 60, 40)).max() <= 1 and (loaded[:, 2:] == 255).all()
    flat = Image.new("P", (4, 4), 1)
    flat.putpalette([0, 0, 0, *there])
    assert np.abs(read(tmp_path, flat, icc_profile=rgb_profile("p3")) - (200, 60, 40)).max() <= 1


@pytest.mark.parametrize("suffix", ["tif", "jpg"])
def test_inks(tmp_path, suffix):
    """A press whose cyan is a dull blue, where the formula without a profile says (0, 255, 255)."""
    dull = (60, -15, -15)
    lab = {(0, 0, 0, 0): (100, 0, 0), (1, 0, 0, 0): dull}
    srgb = ImageCms.createProfile("sRGB")
    exact = ImageCms.buildTransform(ImageCms.createProfile("LAB"), srgb, "LAB", "RGB")
    pixel = Image.frombytes("LAB", (1, 1), bytes([round(dull[0] * 2.55), *(v % 256 for v in dull[1:])]))
    meant = ImageCms.applyTransform(pixel, exact).getpixel((0, 0))
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    for ink, color in (((255, 0, 0, 0), meant), ((0, 0, 0, 0), (255, 255, 255))):
        found = read(
            tmp_path, Image.new("CMYK", (8, 8), ink), suffix, icc_profile=cmyk_profile(lab), **options
        )
        assert np.abs(found - color).max() <= 3, (ink, found, color)


def broken(how: str) -> bytes:
    whole = rgb_profile("p3")
    return {
        "noise": b"no profile at all",
        "cut": whole[:150],
        "empty": whole[:128],
        "for inks": cmyk_profile({}),
        "for grey": grey_profile(1.0),
    }[how]


@pytest.mark.parametrize("how", ["noise", "cut", "empty", "for inks", "for grey"])
def test_a_profile_that_cannot_be_used_is_said_once(tmp_path, caplog, how):
    levels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(levels).save(tmp_path / "a.png", icc_profile=broken(how))
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.png")), levels)
    [record] = caplog.records
    assert "a.png: its colour profile cannot be used" in record.message and "as sRGB" in record.message


def test_a_profile_that_the_file_lost_is_said(tmp_path, caplog):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (10, 20, 30)).save(buffer, "JPEG", quality=100, icc_profile=rgb_profile("p3"))
    content = buffer.getvalue()
    numbered = content.index(b"ICC_PROFILE\0") + 12
    (tmp_path / "a.jpg").write_bytes(content[:numbered] + b"\x01\x02" + content[numbered + 2 :])  # 1 of 2
    load_image(tmp_path / "a.jpg")
    assert "it is damaged" in caplog.text
