"""Folders of photos from anywhere, captions, masks, DreamBench: each is read, or refused in a sentence."""

import io
import json
import os
import string
from argparse import Namespace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ldm.data.buckets import Shape
from ldm.data.captions import CaptionReader
from ldm.data.images import SUFFIXES, list_images, load_image
from ldm.data.items import SourceImage, Stream
from ldm.data.masks import check_masks, find_masks
from ldm.errors import UserError
from ldm.evaluation.dreambench import LISTS, read_dataset
from ldm.evaluation.image_folder import read_image_folder
from ldm.runs.caption_photos import caption_photos
from ldm.runs.check_photos import check_photos
from ldm.runs.dreambench import given_images
from tests.hostile.conftest import SECRET, examples, refused_or

WORDS = {"identifier": "sks", "class_word": "dog"}


def png(mode: str, size: tuple[int, int], color: int) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, "PNG")
    return file.getvalue()


sides = st.sampled_from([1, 2, 16, 17])
pictures = st.builds(
    png,
    st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "I;16"]),
    st.tuples(sides, sides),
    st.sampled_from([0, 1, 255]),
)
json_texts = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.just("sks {class_word}"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["file_name", "text", "caption", "prompt", ""]) | st.text(max_size=3),
            inner,
            max_size=3,
        )
    ),
    max_leaves=5,
).map(lambda value: json.dumps(value).encode())
texts = st.text(max_size=20).map(lambda text: text.encode("utf-8", "surrogatepass"))
contents = st.binary(max_size=20) | texts | json_texts | st.just(b"[" * 100_000)
names = st.sampled_from(
    ["a", "b", "a.png", ".", "..a", "a.mask", " ", "é", "-rf", "$SECRET", "a\nb", "x" * 80]
)


def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("folder")


def everything(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@examples(25)
@given(
    file=st.sampled_from(["a.txt", "a.caption", "a.json", "metadata.jsonl", "all.txt"]),
    content=contents | st.lists(json_texts, max_size=3).map(b"\n".join),
)
def test_any_file_of_captions(file: str, content: bytes, tmp_path: Path):
    for path in tmp_path.iterdir():
        path.unlink()
    (tmp_path / file).write_bytes(content)
    source = str(tmp_path / file) if file == "all.txt" else True

    def read() -> object:
        found = CaptionReader(source, tmp_path, WORDS)(tmp_path / "a.png")
        assert found is None or (found.texts and all(isinstance(text, str) for text in found.texts))
        return found

    refused_or(read)


pairs = st.tuples(pictures, pictures | st.binary(max_size=40)) | st.builds(
    lambda size, photo, mask: (png(photo, size, 255), png(mask, size, 255)),
    st.tuples(sides, sides),
    st.sampled_from(["L", "RGB", "RGBA"]),
    st.sampled_from(["1", "L", "RGB"]),
)  # every other pair is of one size and has a subject


@examples(20)
@given(
    pair=pairs,
    name=st.sampled_from(["a.mask.png", "a-masklabel.png", "a.png.mask.png", "b.mask.png", "A.MASK.PNG"]),
    apart=st.booleans(),
)
def test_any_mask(pair: tuple[bytes, bytes], name: str, apart: bool, tmp_path_factory):
    photo, mask = pair
    folder = fresh(tmp_path_factory)
    root = folder / "masks" if apart else folder
    root.mkdir(exist_ok=True)
    (folder / "a.png").write_bytes(photo)
    (root / name).write_bytes(mask)
    source = SourceImage(folder / "a.png", "hash", "")
    how = {"shape": Shape.square(8), "seed": 0, "crop_variants": 2, "flip": True, "caption_dropout": 0.0}
    stream = Stream("subject", (source,), **how)
    refused_or(lambda: check_masks(stream.views(), find_masks([source], root if apart else None)))


@examples(12)
@given(
    files=st.dictionaries(
        st.tuples(names, st.sampled_from([".png", ".jpg", ".heic", ".txt", ".json", ".mask.png", ""])).map(
            "".join
        ),
        pictures | contents,
        min_size=1,
        max_size=3,
    ),
    size=st.sampled_from([1, 16, 0, -1]),
    unit=st.sampled_from([None, 1, 4, 64, 0, -1]),
    skip=st.booleans(),
)
def test_any_folder_is_checked(
    files: dict[str, bytes], size: int, unit: int | None, skip: bool, tmp_path_factory, monkeypatch
):
    folder = fresh(tmp_path_factory)
    monkeypatch.chdir(folder)
    photos = folder / "photos"
    photos.mkdir()
    for name, content in files.items():
        if name not in (".", ".."):
            (photos / name).write_bytes(content)
    options = Namespace(
        photos=photos,
        size=size,
        crop="random",
        crop_variants=2,
        buckets=unit is not None,
        bucket_unit=64 if unit is None else unit,
        seed=0,
        skip_unreadable=skip,
        mask_root=None,
        out=None,
    )
    before = everything(folder)
    page = refused_or(lambda: check_photos(options))
    assert everything(folder) - before <= {"logs", "logs/photos-photos.html"}
    if page is not None:
        text = page.read_text(encoding="utf-8")
        assert text.rstrip().endswith("</html>") and SECRET not in text and "<script" not in text


lines = st.sampled_from(
    [
        "subject_name,class",
        "dog,dog",
        "a b,c",
        "../x,dog",
        "vase,vase",
        "'a {0} {1} in the snow'.format(unique_token, class_token),",
        "'{2} {x}'.format(unique_token, class_token),",
        "'{'.format(unique_token, class_token),",
        "Live Subject Prompts",
        "",
        "\t" * 5000,
        "'" * 5000,
    ]
)


PUBLISHED = """Classes

subject_name,class
dog,dog
vase,vase

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the snow'.format(unique_token, class_token),
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a hat'.format(unique_token, class_token),
]
""".splitlines()
changed = st.builds(  # one line of the list as it is published is another
    lambda place, line: "\n".join([*PUBLISHED[:place], line, *PUBLISHED[place + 1 :]]),
    st.integers(0, len(PUBLISHED)),
    lines | st.text(max_size=20),
)


@examples(20)
@given(
    content=st.lists(lines | st.text(max_size=20), max_size=12).map("\n".join)
    | changed
    | st.binary(max_size=40)
)
def test_any_list_of_a_benchmark(content: str | bytes, tmp_path: Path):
    for name in ("dog", "vase"):
        (tmp_path / name).mkdir(exist_ok=True)
    raw = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    (tmp_path / LISTS).write_bytes(raw)

    def read() -> None:
        for subject in read_dataset(tmp_path):
            assert subject.photos.parent == tmp_path
            assert all(subject.prompts("sks"))

    refused_or(read)


def test_a_list_of_blank_lines_is_no_hang(tmp_path: Path):
    (tmp_path / LISTS).write_text("\n" * 100_000 + " " * 100_000 + "\n" + "a-" * 50_000)
    with pytest.raises(UserError):
        read_dataset(tmp_path)


@examples(15)
@given(
    name=st.sampled_from(["07-2.png", "7.png", "99.png", "9" * 60 + ".png", "²1.png", "x.png"]),
    image=pictures | st.binary(max_size=30),
    prompt=contents | st.none(),
)
def test_any_images_of_another_tool(name: str, image: bytes, prompt: bytes | None, tmp_path_factory):
    folder = fresh(tmp_path_factory)
    (folder / name).write_bytes(image)
    if prompt is not None:
        (folder / name).with_suffix(".txt").write_bytes(prompt)
    refused_or(lambda: given_images(folder, [f"prompt {k}" for k in range(25)]))

    def read() -> None:
        found = read_image_folder(folder)
        assert all(one.prompt is None or isinstance(one.prompt, str) for one in found)

    refused_or(read)


@examples(25)
@given(start=st.sampled_from([b"", b"\0\0\0\x18ftypheic", b"\0\0\0\x1cftypavif\0\0\0\0"]), rest=st.binary())
def test_any_bytes_named_heic(start: bytes, rest: bytes, tmp_path: Path):
    path = tmp_path / "photo.heic"
    path.write_bytes(start + rest)
    assert refused_or(lambda: load_image(path), where=path) is None


@examples(15)
@given(
    name=st.sampled_from(
        ["pic.png", "loop.png", "gone.png", "folder.png", "pipe.png", "device.png", "hidden/.png", "ÿ.PNG"]
    ),
    skip=st.booleans(),
)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs links and pipes")
def test_any_kind_of_file(name: str, skip: bool, tmp_path_factory):
    """Links in a circle or to nothing, folders, pipes and devices that are named as images."""
    folder = fresh(tmp_path_factory)
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if name.startswith("loop"):
        path.symlink_to(path)
    elif name.startswith("gone"):
        path.symlink_to(folder / "nowhere.png")
    elif name.startswith("folder"):
        path.mkdir()
    elif name.startswith("pipe"):
        os.mkfifo(path)
    elif name.startswith("device"):
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(png("RGB", (4, 4), 0))
    refused_or(lambda: list_images(folder, skip_unreadable=skip))


def test_suffixes_are_lower_case():
    assert all(
        suffix == suffix.lower() and set(suffix) <= set(string.ascii_lowercase + ".") for suffix in SUFFIXES
    )


@pytest.fixture
def captioned(workdir: Path) -> Namespace:
    folder = workdir / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(png("RGB", (16, 16), 0))
    return Namespace(
        photos=folder,
        class_word="dog",
        identifier="sks",
        model=None,
        style="sentence",
        language="English",
        batch_size=4,
        device=None,
        skip_unreadable=False,
        out=None,
    )


def test_a_sheet_among_the_photos_is_refused_before_the_model(captioned: Namespace, monkeypatch):
    monkeypatch.setattr("ldm.runs.caption_photos.VisionLanguageModel", None)
    captioned.out = captioned.photos / "sheet.png"
    with pytest.raises(UserError, match="among the photos"):
        caption_photos(captioned)


@examples(15)
@given(text=contents)
def test_any_caption_that_is_there(text: bytes, captioned: Namespace):
    (captioned.photos / "a.txt").write_bytes(text)
    refused_or(lambda: caption_photos(captioned))
    assert everything(captioned.photos) == {"a.png", "a.txt"}
    assert (captioned.photos / "a.txt").read_bytes() == text
