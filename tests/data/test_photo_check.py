"""The check-up of photos: each trouble is seen where it is, and not where it is not."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from ldm.commands import check_photos
from ldm.commands.dreambooth import main
from ldm.data.buckets import Shape
from ldm.data.images import list_images
from ldm.data.photo_check import PhotoFacts, near_twins, photo_facts, sharpness, troubles
from ldm.errors import UserError
from ldm.runs import job
from ldm.runs.options import parse
from ldm.shipped import CONFIGS
from tests.data.test_color import rgb_profile
from tests.data.test_real_photos import ROOT as REAL
from tests.data.test_real_photos import SUBJECTS

ROOT = Path(__file__).resolve().parents[2]
STORYBOOK = sorted((ROOT / "ldm/storybook/assets/subjects").iterdir())
EDGE = "the subject touches an edge, and may be cut there: a.png"
real = pytest.mark.skipif(not SUBJECTS, reason=f"no photos under {REAL}")


def noise(seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """Blobs of a random image, with a grain that is sharp."""
    draws = np.random.default_rng(seed)
    blobs = Image.fromarray(draws.integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    grain = draws.integers(-20, 21, (size[1], size[0], 1))
    return Image.fromarray(np.clip(np.asarray(blobs, dtype=int) + grain, 0, 255).astype(np.uint8))


def cut_out(box: tuple[int, int, int, int], size: tuple[int, int] = (96, 64)) -> Image.Image:
    """Noise that is opaque inside a box."""
    image = noise(0, size).convert("RGBA")
    alpha = Image.new("L", size)
    ImageDraw.Draw(alpha).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=255)
    image.putalpha(alpha)
    return image


def facts(folder: Path, image: Image.Image, name: str = "a.png", **options) -> PhotoFacts:
    image.save(folder / name, **options)
    return PhotoFacts.of(folder / name)


def said(*photos: PhotoFacts, size: int = 32, **options) -> str:
    shapes = {photo.path: Shape.square(size) for photo in photos}
    return "\n".join(map(str, troubles(photos, shapes=shapes, **options)))


def test_sharpness_is_the_variance_of_the_laplacian():
    """Of single dots, by hand: 4 v at the dot, -v at its four neighbours, 0 elsewhere."""
    levels = np.zeros((34, 34), np.uint8)
    levels[9, 9] = 100
    inside = 32 * 32
    mean_of_squares = (400**2 + 4 * 100**2) / inside
    assert sharpness(Image.fromarray(levels)) == pytest.approx(mean_of_squares)
    assert sharpness(Image.new("RGB", (50, 50), "red")) == 0 and sharpness(Image.new("L", (2, 2))) == 0


def test_sharpness_is_of_one_scale():
    """A photo of more pixels and the same content has about the same; an unsharp one much less."""
    small = noise(1, (512, 512))
    large, larger = (small.resize((side, side), Image.Resampling.LANCZOS) for side in (1024, 1536))
    assert sharpness(large) == pytest.approx(sharpness(larger), rel=0.1)
    assert sharpness(larger.filter(ImageFilter.GaussianBlur(9))) < 0.02 * sharpness(large)


@real
@pytest.mark.parametrize("folder", SUBJECTS, ids=lambda folder: folder.name)
def test_real_photos_are_sharp_and_different(folder):
    photos = [PhotoFacts.of(path) for path in sorted(folder.glob("*.jpg"))]
    assert said(*photos, size=512) == "" and all(photo.profile for photo in photos)


@real
def test_a_blurred_and_a_doubled_real_photo_are_seen(tmp_path):
    with Image.open(next((REAL / "cat").glob("*.jpg"))) as file:
        short = min(file.size)
        sharp = facts(tmp_path, file.convert("RGB"), "a.png")
        soft = facts(tmp_path, file.filter(ImageFilter.GaussianBlur(1.5 * short / 512)), "b.jpg")
        again = facts(tmp_path, ImageEnhance.Brightness(file.resize((600, 600))).enhance(1.1), "c.jpg")
    assert re.findall("blurred, .*: (.*)", said(sharp, soft)) == ["b.jpg"]
    assert near_twins([sharp, again]) == [(sharp, again)]


@pytest.mark.parametrize("folder", STORYBOOK, ids=lambda folder: folder.name)
def test_the_storybook_has_no_trouble(folder):
    assert said(*map(PhotoFacts.of, list_images(folder)), size=64) == ""


@pytest.mark.parametrize(
    ("box", "expected"),
    {
        (36, 20, 60, 44): "",  # in the middle of 96 x 64
        (0, 20, 24, 44): f"{EDGE}\nthe subject is far from the middle: a.png",
        (36, 16, 60, 64): EDGE,
        (36, 0, 60, 48): EDGE,
        (10, 20, 80, 44): "the crop of training cuts the subject; crop by hand: a.png",
        (66, 2, 78, 14): "the subject is far from the middle: a.png",
    }.items(),
)  # fmt: skip
def test_a_subject_that_is_cut_or_off_center(tmp_path, box, expected):
    photo = facts(tmp_path, cut_out(box))
    assert photo.subject.box == box and said(photo) == expected


def test_what_the_crop_leaves_out_is_a_share_of_the_subject(tmp_path):
    """The square of 96 x 64 is from 16 to 80; of a subject from 6 to 56 it leaves out 10 of 50 columns."""
    assert facts(tmp_path, cut_out((6, 20, 56, 44))).subject.cut_by_crop == pytest.approx(0.2)
    assert facts(tmp_path, noise(0)).subject is None
    assert facts(tmp_path, noise(0).convert("RGBA")).subject is None  # opaque everywhere
    assert facts(tmp_path, Image.new("RGBA", (40, 40))).subject is None  # nowhere


def test_alpha_is_upright_as_the_photo_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right
    photo = facts(tmp_path, cut_out((0, 20, 24, 44)), exif=exif)
    assert (photo.height, photo.width, photo.turned) == (96, 64, True)
    assert photo.edges == ["top"] and photo.subject.box == (20, 0, 44, 24)


def masked(box: tuple[int, int, int, int], size: tuple[int, int] = (96, 64)) -> Image.Image:
    """A mask that is white inside a box."""
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=255)
    return mask


@pytest.mark.parametrize(
    "name", ["a.mask.png", "A-masklabel.png", "a.png.mask.png", "masks/a.png", "masks/a.jpg"]
)
@pytest.mark.parametrize("box", [(36, 20, 60, 44), (0, 20, 24, 44), (10, 20, 80, 44)])
def test_a_mask_tells_what_alpha_does(tmp_path, name, box):
    """Under the names that training reads, before the photo's own alpha, and in a folder of their own."""
    photo = tmp_path / ("A.png" if name.startswith("A") else "a.png")
    expected = facts(tmp_path, cut_out(box), photo.name)
    noise(0).save(photo)
    (tmp_path / "masks").mkdir()
    masked(box).save(tmp_path / name)
    (got,) = photo_facts([photo], mask_root=tmp_path / "masks" if name.startswith("masks") else None)
    assert got.subject == expected.subject and said(got) == said(expected)
    cut_out((40, 24, 50, 34)).save(photo)
    (got,) = photo_facts([photo], mask_root=tmp_path / "masks" if name.startswith("masks") else None)
    assert got.subject == expected.subject


@pytest.mark.parametrize(
    ("masks", "expected"),
    [
        ({"a.mask.png": masked((0, 0, 96, 64))}, ""),  # all white, as no mask
        ({"a.mask.png": masked((0, 0, 9, 9), (90, 64))}, r"The mask is 90 x 64 .* \(a.mask.png\): a.png"),
        ({"a.mask.png": Image.new("L", (96, 64))}, r"The mask is empty: .* \(a.mask.png\): a.png"),
        ({"a.mask.png": noise(1)}, r"The mask has colours \(a.mask.png\): a.png"),
        ({n: masked((9, 9, 20, 20)) for n in ("a.mask.png", "a-masklabel.png")}, "it has 2 masks .*: a.png"),
    ],
    ids=["white", "of another size", "black", "coloured", "two"],
)
def test_a_mask_that_a_run_would_refuse_is_said(tmp_path, masks, expected):
    noise(0).save(tmp_path / "a.png")
    for name, mask in masks.items():
        mask.save(tmp_path / name)
    (photo,) = photo_facts([tmp_path / "a.png"])
    assert photo.subject is None and re.fullmatch(expected, said(photo))


def test_captions_are_counted(tmp_path):
    one, other = facts(tmp_path, noise(1), "a.png"), facts(tmp_path, noise(2), "b.png")
    assert said(one, other) == said(one, other, captions=False) == ""
    (tmp_path / "a.txt").write_text("a photo of\nsks dog")
    one = PhotoFacts.of(one.path)
    assert one.caption == "a photo of sks dog"
    for read in (None, True):
        assert said(one, other, captions=read) == "without a caption, though others have one: b.png"
    assert (
        said(one, other, captions=False)
        == "captions that are not read, unless data.params.captions=true: a.png"
    )


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.caption", b"a photo of sks dog", "a photo of sks dog"),
        ("a.json", b'{"caption": ["sks dog", "a sks dog"]}', "sks dog"),
        ("a.json", b'{"camera": "x"}', None),
        ("a.txt", b"\xff\xfe\x00 no text", None),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "a sks dog"}', "a sks dog"),
        ("metadata.jsonl", b'{"file_name": "b.png", "text": "a sks dog"}', None),
        ("metadata.jsonl", b"{", None),
    ],
)
def test_a_caption_is_that_of_a_run_or_none(tmp_path, name, content, found):
    """What the files of other tools say counts, and one that cannot be read stops nothing here."""
    noise(1).save(tmp_path / "a.png")
    (tmp_path / name).write_bytes(content)
    assert PhotoFacts.of(tmp_path / "a.png").caption == found


def test_the_page_shows_photos_views_and_troubles(workdir, capsys):
    folder = workdir / "my <dog>"
    folder.mkdir()
    noise(1).save(folder / "a.jpg", icc_profile=rgb_profile("p3"))
    noise(1).save(folder / "b.png")
    cut_out((0, 20, 24, 44)).save(folder / "c.png")
    page = check_photos.main(
        check_photos.parse([str(folder), "--size", "80", "--crop", "random", "--crop_variants", "3"])
    )
    text, printed = page.read_text(encoding="utf-8"), capsys.readouterr().out
    for trouble in (
        "smaller than 80 pixels",
        "nearly the same, so that they count twice: a.jpg, b.png",
        "edge",
    ):
        assert trouble in text and trouble in printed
    assert text.count("<img") == 3 * (1 + 3) and "3 photos in my &lt;dog&gt;" in text and "http" not in text
    assert "no profile: read as sRGB" in text
    masked((0, 20, 24, 44)).save(folder / "a.mask.png")
    check_photos.main(check_photos.parse([str(folder), "--size", "9"]))
    assert "edge, and may be cut there: a.jpg, c.png" in capsys.readouterr().out
    with pytest.raises(UserError, match="no such folder of masks"):
        check_photos.main(check_photos.parse([str(folder), "--mask_root", str(workdir / "none")]))


def test_in_buckets_the_page_shows_what_training_does(workdir, capsys):
    """A wide photo is not cropped to a square, and is small only where its shape is larger."""
    folder = workdir / "dog"
    folder.mkdir()
    noise(1, (96, 64)).save(folder / "wide.png")
    cut_out((0, 0, 64, 96), (64, 96)).save(folder / "high.png")
    noise(2, (40, 40)).save(folder / "square.png")
    words = [str(folder), "--size", "48", "--buckets", "--bucket_unit", "8"]
    page = check_photos.main(check_photos.parse(words)).read_text(encoding="utf-8")
    assert "in these shapes, height x width: 40 x 56, 48 x 48, 56 x 40 pixels" in page
    printed = capsys.readouterr().out
    assert "smaller than 48 pixels, so enlarged: square.png" in printed and "crop of training" not in printed
    check_photos.main(check_photos.parse([str(folder), "--size", "48"]))
    assert "small" in (printed := capsys.readouterr().out) and "48 x" not in printed
    with pytest.raises(UserError, match="size 50 is no multiple of the buckets' unit of 8"):
        check_photos.main(check_photos.parse([*words, "--size", "50"]))
    with pytest.raises(UserError, match="nothing to show"):
        check_photos.main(check_photos.parse([*words, "--bucket_unit", "0"]))


def test_a_run_says_each_trouble_in_a_line_before_it_begins(words, subject_folder, caplog):
    noise(3).save(subject_folder / "8.png")
    noise(3).save(subject_folder / "9.png")
    assert main([*words, "--dry_run"]) == 0
    lines = [record.getMessage() for record in caplog.records]
    assert f"{subject_folder}: nearly the same, so that they count twice: 8.png, 9.png" in lines


def test_a_dry_run_says_what_the_storybook_cannot_judge(subject_folder, workdir, caplog):
    job = ["--base", str(CONFIGS / "dreambooth.yaml"), "--data_root", str(subject_folder)]
    assert main([*job, "--class_word", "elephant", "--dry_run"]) == 0
    assert "does not know the class 'elephant'" in caplog.text and "not drawn by the storybook" in caplog.text
    assert "has never seen 'elephant'" not in caplog.text and "taken for" not in caplog.text
    caplog.clear()
    assert main([*job, "--dry_run"]) == 0  # whoever forgets the class has the dog's
    assert f"{subject_folder}: taken for a dog, as in the config; --class_word" in caplog.text


@pytest.mark.parametrize("form", ["true", "false", "file_names", "all.txt"])
def test_a_run_speaks_of_missing_captions_only_if_it_reads_them(words, subject_folder, workdir, caplog, form):
    for path in list_images(subject_folder):
        path.rename(path.with_stem(f"sks disc {path.stem}"))
    (subject_folder / "sks disc 0.txt").write_text("a sks disc")
    (workdir / "all.txt").write_text("a sks disc\na photo of sks disc\n")
    assert main([*words, "--dry_run", f"data.params.captions={form}"]) == 0
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert ("without a caption, though others have one" in said) == (form == "true")
    assert ("captions that are not read, unless data.params.captions=true: sks disc 0" in said) == (
        form != "true"
    )


def test_a_run_reads_its_photos_once(words, subject_folder, caplog, monkeypatch):
    """What is checked before the run is what it trains on."""
    (photo, *_) = list_images(subject_folder)
    with Image.open(photo) as image:
        masked((2, 2, 9, 9), image.size).save(photo.with_suffix(".mask.png"))
    monkeypatch.setattr(job, "DreamBoothRun", lambda module, data, *rest, **more: data.images.photos.values)
    caplog.set_level("INFO")
    ((*photos,),) = job.run_job(parse(words))
    assert photo in {image.path for image in photos}
    assert sum("masks, not photos" in record.getMessage() for record in caplog.records) == 1
