"""Pictures from anywhere: each becomes 8-bit RGB or is refused by name."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ldm.data.images import fit_image, list_images, load_image, to_tensor
from tests.hostile.conftest import examples, outcome, refused_or

MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F", "HSV", "LAB"]
FORMAT = {
    "PNG": "png",
    "JPEG": "jpg",
    "TIFF": "tif",
    "GIF": "gif",
    "BMP": "bmp",
    "WEBP": "webp",
    "PPM": "ppm",
}


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def bomb() -> bytes:
    """A PNG of some bytes that says it is of 60000 x 60000 pixels."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
BAD = {
    "an empty file": b"",
    "text": b"this is no picture",
    "half of a PNG": encoded(NOISE)[:1500],
    "half of a JPEG": encoded(NOISE, "JPEG")[:700],
    "a PNG with one bit flipped": bytearray(encoded(NOISE)),
    "a PNG that says 60000 x 60000": bomb(),
    "32-bit floating-point TIFF": encoded(Image.new("F", (8, 8), 0.5), "TIFF"),
    "an EPS program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n",
    "an SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>',
}
BAD["a PNG with one bit flipped"][400] ^= 4
GOOD = {
    "1 x 1 pixel": encoded(Image.new("RGB", (1, 1))),
    "8192 x 1 pixels": encoded(Image.new("L", (8192, 1))),
    "8192 x 8192 pixels, 1 bit": encoded(Image.new("1", (8192, 8192))),
    "16-bit grey": encoded(Image.new("I;16", (9, 9), 40000)),
    "CMYK JPEG": encoded(Image.new("CMYK", (9, 9)), "JPEG"),
    "a palette with a transparent colour": encoded(Image.new("P", (9, 9)), transparency=0),
}


def look(path: Path) -> str:
    image = load_image(path)
    assert to_tensor(fit_image(image, 16)).shape == (3, 16, 16)
    return f"a picture of {image.width} x {image.height}, {image.mode}"


@pytest.mark.parametrize("what", BAD)
def test_bad_pictures_are_refused(tmp_path: Path, what: str):
    path = tmp_path / "photo.png"
    path.write_bytes(BAD[what])
    got = outcome("picture", what, lambda: look(path), hide=tmp_path)
    assert got.startswith("refused: ") and "photo.png" in got


@pytest.mark.parametrize("what", GOOD)
def test_odd_pictures_are_taken(tmp_path: Path, what: str):
    path = tmp_path / "photo.png"
    path.write_bytes(GOOD[what])
    assert outcome("picture", what, lambda: look(path)).endswith("RGB")


@examples(60)
@given(
    mode=st.sampled_from(MODES),
    kind=st.sampled_from(list(FORMAT)),
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    cut=st.none() | st.floats(0, 1),
    flips=st.lists(st.floats(0, 1, exclude_max=True), max_size=4),
)
def test_any_picture_whole_or_damaged(tmp_path: Path, mode, kind, size, cut, flips):
    try:
        content = bytearray(encoded(Image.new(mode, size), kind))
    except (OSError, ValueError, KeyError, SystemError):
        return  # this format has no such mode
    for flip in flips:
        content[int(flip * len(content))] ^= 1 << (int(flip * 8e6) % 8)
    path = tmp_path / f"photo.{FORMAT[kind]}"
    path.write_bytes(content if cut is None else content[: int(cut * len(content))])
    got = refused_or(lambda: look(path), where=path)
    assert got is None or got.endswith("RGB")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@examples(60)
@given(start=st.sampled_from([b"", *(encoded(NOISE, kind)[:30] for kind in FORMAT)]), rest=st.binary())
def test_any_bytes(tmp_path: Path, start: bytes, rest: bytes):
    path = tmp_path / "photo.jpg"
    path.write_bytes(start + rest)
    assert refused_or(lambda: list_images(tmp_path), where=path) is None
