"""Sheets hold every picture enlarged but unblurred, and PNGs say how they were made."""

import json

import pytest
from PIL import Image

from ldm.contact_sheet import A1111_SAMPLERS, contact_sheet, parameters_line, save_image
from ldm.diffusion.samplers import SAMPLERS

RED, BLUE = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
SETTINGS = {
    "prompt": "a dog, Hündchen 犬",
    "negative_prompt": "blur",
    "steps": 50,
    "sampler": "ddim",
    "guidance_scale": 7.5,
    "seed": 3,
    "width": 64,
    "height": 48,
    "model_hash": "0123456789abcdef",
}


def colours(sheet: Image.Image, colour: tuple[int, int, int]) -> int:
    return sum(n for n, c in sheet.getcolors(sheet.width * sheet.height) if c == colour)


def test_small_pictures_are_enlarged_to_the_cell():
    sheet = contact_sheet([("a red square", [RED, BLUE]), ("a blue one", [BLUE])], cell=128)
    assert colours(sheet, (255, 0, 0)) == 128**2 and colours(sheet, (0, 0, 255)) == 2 * 128**2
    assert colours(sheet, (0, 0, 0)) > 20  # the caption


def test_large_pictures_stay():
    sheet = contact_sheet([("", [Image.new("RGB", (300, 200), "red")])])
    assert colours(sheet, (255, 0, 0)) == 300 * 200


@pytest.mark.parametrize("caption", ["a photo of a very long story " * 5, "x" * 300])
def test_long_captions_wrap(caption):
    short, long = (contact_sheet([(text, [RED])]) for text in ("short", caption))
    assert long.width == short.width and long.height > short.height + 20


def test_an_empty_sheet_is_still_a_picture():
    assert contact_sheet([]).width > 0 and contact_sheet([("nothing", [])]).height > 128


def test_a_picture_carries_its_settings(tmp_path):
    path = save_image(tmp_path / "0.png", RED, SETTINGS)
    with Image.open(path) as picture:
        text = picture.text
        assert picture.tobytes() == RED.tobytes()
    assert json.loads(text["dreambooth"]) == SETTINGS
    assert text["parameters"] == (
        "a dog, Hündchen 犬\nNegative prompt: blur\n"
        "Steps: 50, Sampler: DDIM, CFG scale: 7.5, Seed: 3, Size: 64x48, Model hash: 0123456789"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["0.png"]


def test_every_sampler_has_the_name_that_others_know():
    assert list(A1111_SAMPLERS) == list(SAMPLERS)
    for settings, name in [
        ({"sampler": "dpm++2m"}, "DPM++ 2M"),
        ({"sampler": "dpm++2m", "spacing": "karras"}, "DPM++ 2M Karras"),
        ({"sampler": "dpm++2m_sde", "spacing": "karras"}, "DPM++ 2M SDE Karras"),
        ({"sampler": "euler_a", "spacing": "trailing"}, "Euler a"),
        ({"sampler": "unipc", "spacing": None}, "UniPC"),
        ({"sampler": {"target": "mine.heavy_ball", "params": {"beta": 0.5}}}, "heavy_ball"),
    ]:
        assert f"Sampler: {name}, " in parameters_line(SETTINGS | settings)


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    path = save_image(tmp_path / "0.png", RED, SETTINGS)
    before = path.read_bytes()

    def torn(self: Image.Image, file, **options) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", torn)
    with pytest.raises(OSError):
        save_image(path, BLUE, SETTINGS)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
