"""Masks made by rembg, whose function is scripted here: beside photos, none overwritten, with a sheet."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ldm.commands import make_masks
from ldm.data.images import list_images
from ldm.data.masks import read_mask
from ldm.errors import UserError
from tests.data.test_dreambooth import noise


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, int]]]:
    """What the stand-in of rembg was asked for: it finds the left half of wide photos."""
    seen = []

    def remove(photo: Image.Image, *, session: str, only_mask: bool) -> Image.Image:
        assert only_mask and photo.mode == "RGB"
        seen.append((session, photo.size))
        mask = Image.new("L", photo.size)
        if photo.width > photo.height:
            mask.paste(255, (0, 0, photo.width // 2, photo.height))
        return mask

    def new_session(name: str) -> str:
        if name == "unknown":
            raise ValueError("No session class found for model 'unknown'")
        if name == "u2net_offline":
            raise ConnectionError(
                f"HTTPSConnectionPool(host='github.com', port=443): {'retried ' * 99}\nmore"
            )
        if name == "u2net_damaged":
            raise RuntimeError("[ONNXRuntimeError] : 7 : INVALID_PROTOBUF")
        return name

    monkeypatch.setitem(sys.modules, "rembg", SimpleNamespace(remove=remove, new_session=new_session))
    return seen


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, width in {"a.jpg": 40, "a.png": 30, "b.png": 24, "tall.png": 8}.items():
        noise(1, 20, width).save(folder / name)
    cut = noise(2, 20, 30).convert("RGBA")
    cut.putalpha(Image.new("L", cut.size, 200))
    cut.save(folder / "cut.png")
    Image.new("L", (24, 20), 255).save(folder / "b-masklabel.png")
    return folder


def test_masks_are_written_where_there_are_none(photos: Path, asked: list, caplog: pytest.LogCaptureFixture):
    before = {path: path.read_bytes() for path in photos.iterdir()}
    sheet = make_masks.main(make_masks.parse([str(photos)]))
    new = {path.name for path in photos.iterdir()} - {path.name for path in before}
    assert new == {"a.jpg.mask.png", "a.png.mask.png"}  # not `a`, which would be of both
    assert asked == [("u2net", (40, 20)), ("u2net", (30, 20)), ("u2net", (8, 20))]
    assert all(path.read_bytes() == content for path, content in before.items())
    assert "tall.png: no subject was found" in caplog.text
    mask = read_mask(photos / "a.jpg.mask.png", photos / "a.jpg")
    np.testing.assert_array_equal(mask[0], [1.0] * 20 + [0.0] * 20)
    assert sheet == photos.parent / "photos-masks.png" and len(list_images(photos)) == 5
    with Image.open(sheet) as image:
        assert image.width > 3 * 256 and image.height > 4 * 128  # photo, mask, inside; a row for each mask

    again = {path: path.read_bytes() for path in photos.iterdir()}
    sheet = photos.parent / "s.png"
    make_masks.main(make_masks.parse([str(photos), "--model", "isnet", "--sheet", str(sheet)]))
    assert asked[3:] == [("isnet", (8, 20))] and sheet.exists()
    assert {path: path.read_bytes() for path in photos.iterdir()} == again


def test_a_sheet_among_the_photos_is_refused_before_any_mask(photos: Path, asked: list, tmp_path: Path):
    before = {path.name for path in photos.iterdir()}
    with pytest.raises(UserError, match="sheet would lie among the photos.*photos/s.png"):
        make_masks.main(make_masks.parse([str(photos), "--sheet", str(photos / "s.png")]))
    assert asked == [] and {path.name for path in photos.iterdir()} == before
    with pytest.raises(UserError, match="no such folder of images.*none/photos"):
        make_masks.main(make_masks.parse([str(tmp_path / "none/photos")]))
    with pytest.raises(UserError, match="no such folder of images.*Name the folder that it is in"):
        make_masks.main(make_masks.parse([str(next(photos.iterdir()))]))
    assert asked == [] and not (tmp_path / "none").exists()
    sheet = tmp_path / "new" / "s.png"
    assert make_masks.main(make_masks.parse([str(photos), "--sheet", str(sheet)])) == sheet and sheet.exists()


def test_without_rembg_one_sentence_says_so(photos: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "rembg", None)
    with pytest.raises(UserError, match=r"needs rembg, which is not installed.*\[masks\]"):
        make_masks.main(make_masks.parse([str(photos)]))


def test_an_unknown_network_is_refused(photos: Path, asked: list):
    with pytest.raises(UserError, match="knows no such network.*unknown.*rembg's documentation"):
        make_masks.main(make_masks.parse([str(photos), "--model", "unknown"]))
    assert asked == []


@pytest.mark.parametrize(
    ("name", "reason"), [("u2net_offline", "HTTPSConnectionPool"), ("u2net_damaged", "INVALID_PROTOBUF")]
)
def test_weights_that_cannot_be_had_are_said_in_a_sentence(photos: Path, asked: list, name: str, reason: str):
    with pytest.raises(UserError) as refused:
        make_masks.main(make_masks.parse([str(photos), "--model", name]))
    said = str(refused.value)
    assert "weights cannot be had" in said and reason in said and f"Put {name}.onnx" in said
    assert "NAME.mask.png by hand" in said and len(said) < 400 and "\n" not in said
    assert asked == [] and not list(photos.glob("*.mask.png"))


def test_rembg_that_ends_the_program_for_want_of_onnxruntime_does_not(photos: Path, tmp_path, monkeypatch):
    (tmp_path / "packages" / "rembg").mkdir(parents=True)
    (tmp_path / "packages" / "rembg" / "__init__.py").write_text("import sys\nsys.exit(1)\n")
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.delitem(sys.modules, "rembg", raising=False)
    with pytest.raises(UserError, match=r"needs onnxruntime for rembg, which is not installed.*\[masks\]"):
        make_masks.main(make_masks.parse([str(photos)]))
