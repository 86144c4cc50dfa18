"""Captions: the files of other tools, names, one file for all, and how items change them."""

import json
import logging
import shutil
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from ldm.data.captions import CaptionReader, CaptionShuffle, name_as_caption
from ldm.data.dreambooth import DreamBoothDataModule
from ldm.errors import UserError

WORDS = {"identifier": "sks", "class_word": "dog"}
PHOTOS = ("a.jpg", "b.png", "c.png", "d.png", "e.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for k, name in enumerate(PHOTOS):
        Image.new("RGB", (8, 8), (40 * k, 80, 120)).save(folder / name)
    return folder


def module(folder: Path, **params) -> DreamBoothDataModule:
    data = DreamBoothDataModule(
        subject_root=str(folder), class_word="dog", size=8, num_priors=0, cache_latents=False, **params
    )
    data.check()
    data.setup()
    return data


def captions(data: DreamBoothDataModule, items: int = 200) -> list[tuple[str, str]]:
    """(photo, caption) of the first items."""
    stream = data.dataset.streams["subject"]
    return [(stream.view(k).source.path.name, stream.caption(k)) for k in range(items)]


def test_without_a_file_there_is_none(folder: Path):
    assert CaptionReader(True, folder, WORDS)(folder / "a.jpg") is None
    (folder / "a.txt").write_text("a sks dog")
    assert CaptionReader(False, folder, WORDS)(folder / "a.jpg") is None


@pytest.mark.parametrize(
    "name, content, texts",
    [
        ("a.txt", "\ufeffa {identifier}\n {class_word} in Köln\r\n", ["a sks dog in Köln"]),
        ("a.caption", "{identifier} {class_word}, sitting\n", ["sks dog, sitting"]),
        ("a.json", '{"caption": "a sks  dog", "width": 8}', ["a sks dog"]),
        ("a.json", '{"captions": ["a sks dog", "{identifier} asleep"]}', ["a sks dog", "sks asleep"]),
        ("a.json", '["sks one", "sks two"]', ["sks one", "sks two"]),
        ("a.json", '"sks alone"', ["sks alone"]),
        ("metadata.jsonl", '{"file_name": "a.jpg", "text": "sks listed"}\n', ["sks listed"]),
        (
            "metadata.jsonl",
            '\n{"file_name": "a.jpg", "text": "sks 1"}\n{"file_name": "a.jpg", "text": "sks 2"}',
            ["sks 1", "sks 2"],
        ),
    ],
)
def test_files_of_several_tools(folder: Path, name: str, content: str, texts: list[str]):
    (folder / name).write_bytes(content.encode())
    read = CaptionReader(True, folder, WORDS)
    found = read(folder / "a.jpg")
    assert list(found.texts) == texts and found.file == folder / name
    assert read(folder / "b.png") is None


def test_the_photo_s_own_file_comes_before_the_list(folder: Path):
    (folder / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "listed"}')
    for name, text in {"a.json": "by json", "a.caption": "by caption", "a.txt": "by text"}.items():
        (folder / name).write_text(json.dumps(text) if name == "a.json" else text)
        assert CaptionReader(True, folder, WORDS)(folder / "a.jpg").texts == (text,)


def test_the_list_of_a_folder_that_ships_is_read_from_any_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    (folder / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "listed"}')
    monkeypatch.setattr("ldm.shipped.CONFIGS", folder.parent / "configs")
    (folder.parent / "configs").symlink_to(folder.parent, target_is_directory=True)
    assert CaptionReader(True, f"configs/{folder.name}", WORDS)(folder / "a.jpg").texts == ("listed",)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b" \n", "caption is empty.*a.txt"),
        ("a.txt", b"\xff\xfe\xff", "cannot be read.*UTF-8"),
        ("a.json", b"{", "JSON cannot be read.*a.json"),
        ("a.json", b'{"tags": "sks"}', "holds no caption.*a.json"),
        ("a.json", b'{"caption": [3]}', "holds no caption"),
        ("a.json", b'{"caption": []}', "caption is empty"),
        ("metadata.jsonl", b'{"text": "sks"}', "names no image.*metadata.jsonl:1"),
        ("metadata.jsonl", b'\n{"file_name": "a.jpg"}', "holds no caption.*metadata.jsonl:2"),
        ("a.caption", b"a photo of a dog", '"sks" is missing.*a.caption'),
        ("a.json", b'["a sks dog", "a dog"]', '"sks" is missing.*a.json'),
        ("a.txt", b"a {thing}", "Unknown placeholder"),
    ],
)
def test_what_cannot_be_a_caption_is_refused(folder: Path, name: str, content: bytes, message: str):
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        module(folder, captions=True)


@pytest.mark.parametrize(
    "name, caption",
    [
        ("sks dog on the moon.jpg", "sks dog on the moon"),
        ("sks_dog_on_the_moon (2).jpg", "sks dog on the moon"),
        ("sks_dog-03.png", "sks dog"),
        ("sks dog 12.png", "sks dog"),
        ("sks dog2.png", "sks dog2"),
        ("7.png", "7"),
    ],
)
def test_names_of_files(name: str, caption: str):
    assert name_as_caption(Path(name)) == caption


def test_names_need_the_identifier(folder: Path):
    with pytest.raises(UserError, match='"sks" is missing from "a".*a.jpg'):
        module(folder, captions="file_names")
    for path in list(folder.iterdir()):
        path.rename(path.with_stem(f"{{identifier}} {path.stem}"))
    assert dict(captions(module(folder, captions="file_names")))["{identifier} a.jpg"] == "sks a"


def test_one_file_for_all_photos(folder: Path, tmp_path: Path):
    file = tmp_path / "all.txt"
    file.write_text("# three\n{identifier} {class_word}\n\na photo of {identifier}\n  sks in the snow \n")
    seen = captions(module(folder, captions=str(file)))
    assert {text for _, text in seen} == {"sks dog", "a photo of sks", "sks in the snow"}
    assert all(len({text for name, text in seen if name == photo}) == 3 for photo in PHOTOS)
    for wrong, message in ((tmp_path / "none.txt", "no such file of captions"), (folder / "a.jpg", "UTF-8")):
        with pytest.raises(UserError, match=message):
            module(folder, captions=str(wrong))
    file.write_text("# none\n")
    with pytest.raises(UserError, match="caption is empty"):
        module(folder, captions=str(file))


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.txt", "A photo of {identifier} dog", "a.txt"),
        ("a.json", '["a dog", "SKS dog"]', "a.json, caption 2"),
        ("metadata.jsonl", '{"file_name": "a.jpg", "text": "sks"}', "metadata.jsonl:1, a.jpg"),
    ],
)
def test_a_caption_of_the_class_has_no_identifier(folder: Path, tmp_path: Path, name, content, place):
    of_class = tmp_path / "class"
    shutil.copytree(folder, of_class)
    (folder / "a.txt").write_text("a sks dog")
    (of_class / "b.txt").write_text("a photo of a {class_word}")
    module(folder, captions=True, prior_root=str(of_class))
    (of_class / name).write_text(content)
    with pytest.raises(UserError, match=f'identifier "sks" is in a caption of the class.*{place}.*Remove it'):
        module(folder, captions=True, prior_root=str(of_class))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_only_ends_of_lines_end_a_caption(folder: Path, tmp_path: Path, end: str):
    """Others of Unicode's may stand in the text of a JSON, or be pasted into a list."""
    entries = [{"file_name": name, "text": "sks\u2028on\x85the moon"} for name in PHOTOS]
    listed = end.join(json.dumps(entry, ensure_ascii=False) for entry in entries) + end
    (folder / "metadata.jsonl").write_bytes(listed.encode())
    assert {text for _, text in captions(module(folder, captions=True))} == {"sks on the moon"}
    (tmp_path / "all.txt").write_bytes(f"sks\u2028on\x0cthe moon{end}a sks{end}".encode())
    seen = captions(module(folder, captions=str(tmp_path / "all.txt")))
    assert {text for _, text in seen} == {"sks on the moon", "a sks"}


def test_the_log_says_how_many_photos_have_captions(folder: Path, caplog):
    for name in ("a.txt", "b.caption", "d.txt"):
        (folder / name).write_text("a sks dog")
    with caplog.at_level(logging.INFO):
        module(folder, captions=True)
    assert f"{folder}: captions for 3 of 5 photos" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        module(folder)
    assert "captions for" not in caplog.text


def test_several_captions_of_a_photo_come_equally_often(folder: Path):
    (folder / "a.json").write_text('["sks 1", "sks 2", "sks 3"]')
    seen = Counter(text for name, text in captions(module(folder, captions=True), 1500) if name == "a.jpg")
    assert seen.keys() == {"sks 1", "sks 2", "sks 3"} and sum(seen.values()) == 300
    assert min(seen.values()) > 75  # three sigma


def shuffled(folder: Path, text: str, items: int = 300, **params) -> list[str]:
    for photo in PHOTOS:
        (folder / photo).with_suffix(".txt").write_text(text)
    data = module(folder, captions=True, caption_shuffle=CaptionShuffle(**params))
    return [caption for _, caption in captions(data, items)]


def test_parts_change_places_after_the_head(folder: Path):
    seen = Counter(shuffled(folder, "sks dog,  sunny,grass, , running"))
    assert len(seen) == 6 and min(seen.values()) > 25
    assert all(text.startswith("sks dog, ") for text in seen)
    assert {tuple(sorted(text.split(", "))) for text in seen} == {("grass", "running", "sks dog", "sunny")}
    assert len(Counter(shuffled(folder, "sks dog, sunny, grass", keep=0))) == 6
    assert set(shuffled(folder, "sks dog, sunny, grass", keep=3)) == {"sks dog, sunny, grass"}
    assert set(shuffled(folder, "a photo of sks dog")) == {"a photo of sks dog"}


def test_parts_drop_out_but_the_head_never(folder: Path):
    seen = shuffled(folder, "sks dog, sunny, grass", items=1000, part_dropout=0.25, shuffle=False)
    assert set(seen) == {"sks dog", "sks dog, sunny", "sks dog, grass", "sks dog, sunny, grass"}
    without = sum("sunny" not in text for text in seen) / len(seen)
    assert abs(without - 0.25) < 4 * (0.1875 / len(seen)) ** 0.5
    assert set(shuffled(folder, "sks dog, sunny", part_dropout=1.0)) == {"sks dog"}
    with pytest.raises(UserError, match='"sks" is not among the first 1 parts of "sunny, sks dog".*a.txt'):
        shuffled(folder, "sunny, sks dog", part_dropout=0.1)
    with pytest.raises(UserError, match='"sks" is not among the first 0 parts.*subject_prompt'):
        shuffled(folder, "sks dog", keep=0, part_dropout=0.1)


def test_what_an_item_says_follows_from_its_number(folder: Path):
    (folder / "a.json").write_text('["sks dog, red, green, blue", "sks dog, one, two, three"]')
    how = {"captions": True, "caption_shuffle": CaptionShuffle(part_dropout=0.3)}
    first, again = (module(folder, **how).dataset.streams["subject"] for _ in range(2))
    forwards = [first.caption(k) for k in range(100)]
    assert [again.caption(k) for k in reversed(range(100))] == forwards[::-1]
    other = module(folder, seed=7, **how).dataset.streams["subject"]
    assert [other.caption(k) for k in range(100)] != forwards
    plain = module(folder).dataset.streams["subject"]
    assert [first.view(k).flip for k in range(50)] == [plain.view(k).flip for k in range(50)]
