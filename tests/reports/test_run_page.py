"""The page of a run: whole in itself, everything on it, nothing of it able to break it."""

import ast
import base64
import io
import re
import tomllib
import weakref
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data import images
from ldm.reports.metric_notes import CURVES
from ldm.reports.metric_notes import METRICS as NOTES
from ldm.reports.run_page import PHOTO_SIDE, PREVIEW_WIDTH, SHOWN_SAMPLES, Report, Row, write_report

ROOT = Path(__file__).resolve().parents[2]
METRICS = {
    "subject_fidelity": 0.87,
    "prompt_fidelity": 0.94,
    "class_drift": 0.02,
    "diversity_ratio": 0.97,
    "intervals": {"subject_fidelity": [0.84, 0.9]},
    "base": {"subject_fidelity": 0.31, "prompt_fidelity": 0.97, "class_drift": 0.0, "diversity_ratio": 1.0},
    "ceiling": {"subject_fidelity": 1.0},
    "seconds": {"prior_images": 12.5, "training": 30.0},
}


class Tags(HTMLParser):
    """Checks that tags are closed in the order they were opened; collects the pictures' sources."""

    VOID = {"meta", "img", "br", "line", "rect", "polyline"}

    def __init__(self) -> None:
        super().__init__()
        self.open, self.sources, self.alts, self.text = [], [], [], []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag == "img":
            self.sources.append(dict(attrs)["src"])
            self.alts.append(dict(attrs)["alt"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def pictures(count: int, side: int = 16) -> list[Image.Image]:
    return [Image.new("RGB", (side, side), (40 * k, 80, 120)) for k in range(count)]


def report(**changes) -> Report:
    fields = {
        "title": "rex: a photo of sks dog",
        "facts": {"Date": "3 May 2026, 10:00", "Command": "python main.py --base 'my dog.yaml'"},
        "photos": {"sks dog": pictures(4)},
        "priors": pictures(3),
        "rows": [Row("a photo of sks dog", pictures(2), pictures(2))],
        "metrics": METRICS,
        "curves": {"train/subject_loss": [(k, 0.3 / (k + 1)) for k in range(40)]},
        "config": "name: rex\n",
        "previews": pictures(1, side=300),
        "preview_steps": [100],
    }
    return Report(**fields | changes)


def parsed(path: Path) -> Tags:
    tags = Tags()
    tags.feed(path.read_text(encoding="utf-8"))
    assert tags.open == []
    return tags


def test_the_page_is_whole_in_itself(tmp_path: Path):
    page = write_report(tmp_path / "report.html", report())
    tags = parsed(page)
    assert len(tags.sources) == 4 + 3 + 4 + 1
    assert all(source.startswith("data:image/") for source in tags.sources)
    assert not re.search(r"https?://|<script|<link|@import", page.read_text(encoding="utf-8"))


def test_pixels_of_small_pictures_are_exact(tmp_path: Path):
    tags = parsed(
        write_report(tmp_path / "report.html", report(rows=[], priors=[], previews=[], preview_steps=[]))
    )
    shown = [Image.open(io.BytesIO(base64.b64decode(s.split(",")[1]))) for s in tags.sources]
    assert [image.tobytes() for image in shown] == [image.tobytes() for image in pictures(4)]


def test_figures_stand_with_what_they_compare_to(tmp_path: Path):
    text = " ".join(parsed(write_report(tmp_path / "report.html", report())).text)
    assert "0.87" in text and "0.84 to 0.90" in text and "base 0.31" in text and "photos 1.00" in text
    assert "42.5" in text  # 12.5 + 30


def test_a_run_without_figures_priors_or_previews(tmp_path: Path):
    page = write_report(
        tmp_path / "report.html", report(metrics={}, priors=[], previews=[], preview_steps=[], curves={})
    )
    text = " ".join(parsed(page).text)
    assert "Subject fidelity" not in text and "Prior images" not in text and "During training" not in text


def test_text_cannot_become_markup(tmp_path: Path):
    evil = '<img src="http://x"> & "quotes"'
    page = write_report(
        tmp_path / "report.html",
        report(title=evil, config=evil, rows=[Row(evil, pictures(1), pictures(1))]),
    )
    tags = parsed(page)
    assert all(source.startswith("data:") for source in tags.sources)
    assert " ".join(tags.text).count(evil) >= 3


class Held:
    """Counts the photos that are in memory at once."""

    def __init__(self, load):
        self.load = load
        self.now = self.most = 0

    def __call__(self, path: Path) -> Image.Image:
        image = self.load(path)
        self.now += 1
        self.most = max(self.most, self.now)
        weakref.finalize(image, self.let_go)
        return image

    def let_go(self) -> None:
        self.now -= 1


def test_many_large_photos_make_a_small_page_and_are_read_one_by_one(tmp_path: Path, monkeypatch):
    """30 photos of noise, which no format compresses, larger than thumbnails as cameras' are."""
    noise = np.random.default_rng(0).integers(0, 256, (450, 600, 3), np.uint8)
    for k in range(30):
        Image.fromarray(np.roll(noise, k, axis=0)).save(tmp_path / f"{k:02d}.jpg", quality=60)
    held = Held(images.load_image)
    monkeypatch.setattr(images, "load_image", held)
    photos = images.ImageFiles(sorted(tmp_path.glob("*.jpg")))
    page = write_report(tmp_path / "report.html", report(photos={"sks dog": photos}, priors=photos[:2]))
    assert page.stat().st_size < 5_000_000
    assert (held.most, held.now) == (1, 0)
    shown = [size_of(source) for source in parsed(page).sources[:30]]
    assert set(shown) == {(PHOTO_SIDE, PHOTO_SIDE * 3 // 4)}


def size_of(source: str) -> tuple[int, int]:
    return Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).size


@pytest.mark.parametrize("size", [(800, 600), (600, 800), (2500, 25), (320, 320), (129, 40)])
def test_thumbnails_keep_their_proportions_and_small_photos_their_size(tmp_path: Path, size: tuple):
    photo = Image.new("RGB", size, "red")
    page = write_report(
        tmp_path / "report.html",
        report(photos={"sks dog": [photo]}, priors=[], rows=[], previews=[], preview_steps=[]),
    )
    width, height = size_of(parsed(page).sources[0])
    assert max(width, height) == min(PHOTO_SIDE, max(size))
    assert width / height == pytest.approx(size[0] / size[1], rel=0.5 / min(width, height))
    assert photo.size == size  # the report changes nothing that it is given


def test_a_preview_has_its_own_proportions(tmp_path: Path):
    """An image of a given width whose height stays that of the attribute is stretched."""
    grid = Image.new("RGB", (1400, 4000), "red")
    page = write_report(tmp_path / "report.html", report(previews=[grid]))
    width, height = size_of(parsed(page).sources[-4])
    assert width == PREVIEW_WIDTH and abs(height - 4000 * width / 1400) <= 1
    style = page.read_text(encoding="utf-8").split("<style>")[1].split("</style>")[0]
    (rules,) = re.findall(r"^img \{([^}]*)\}", style, re.MULTILINE)
    assert "height: auto" in rules and "max-width: 100%" in rules


def test_what_a_run_has_to_say_stands_at_the_top(tmp_path: Path):
    notes = ["The storybook has no <vase>", "Another one"]
    page = write_report(tmp_path / "report.html", report(metrics=METRICS | {"notes": notes}))
    tags = parsed(page)
    text = " ".join(tags.text)
    assert all(note in text for note in notes)
    assert text.index("Another one") < text.index("Subject fidelity")
    assert 'class="note"' not in write_report(tmp_path / "other.html", report()).read_text(encoding="utf-8")


EACH = {
    "sks dog": {"subject_fidelity": 0.9, "bleeding": 0.04, "intervals": {"subject_fidelity": [0.8, 0.95]}},
    "zwx cat": {"subject_fidelity": 0.8, "bleeding": 0.0},
}
MATRIX = {
    "trained": {"sks dog": {"sks dog": 0.9, "zwx cat": 0.06, "neither": 0.04}, "dog": {"zwx cat": 0.2}},
    "base": {"sks dog": {"sks dog": 0.3, "zwx cat": 0.02, "neither": 0.6}, "dog": {"zwx cat": 0.1}},
}


def test_several_subjects_have_a_row_each_and_the_bleeding_matrix(tmp_path: Path):
    metrics = METRICS | {"bleeding": 0.02, "concepts": EACH, "bleeding_matrix": MATRIX}
    photos = {"sks dog": pictures(2), "zwx cat": pictures(2)}
    page = write_report(tmp_path / "report.html", report(metrics=metrics, photos=photos)).read_text()
    rows = [" ".join(row.split()) for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)]
    head, cell = '<th scope="col">{}</th>', '<th scope="row">{}</th>'
    names = "".join(map(head.format, ("Subject fidelity", "Bleeding")))
    assert head.format("subject") + names in rows
    assert cell.format("sks dog") + "<td>0.90 (0.80 to 0.95)</td><td>0.04</td>" in rows
    assert cell.format("zwx cat") + "<td>0.80</td><td>0.00</td>" in rows
    assert "".join(map(head.format, ("asked", "sks dog", "zwx cat", "neither"))) in rows
    assert cell.format("sks dog") + "<td>0.90 (0.30)</td><td>0.06 (0.02)</td><td>0.04 (0.60)</td>" in rows
    assert cell.format("dog") + "<td></td><td>0.20 (0.10)</td><td></td>" in rows
    assert "<h3>zwx cat</h3>" in page and 'alt="Photo of zwx cat, 2"' in page
    alone = write_report(tmp_path / "alone.html", report()).read_text()
    assert "Each subject" not in alone and "<h2>Bleeding" not in alone and "<h3>sks dog</h3>" not in alone


def test_it_begins_with_how_the_run_was_made(tmp_path: Path):
    text = " ".join(parsed(write_report(tmp_path / "report.html", report())).text)
    assert text.index("3 May 2026, 10:00") < text.index("python main.py --base 'my dog.yaml'")
    assert text.index("my dog.yaml") < text.index("Subject fidelity")


def test_each_picture_says_what_it_is(tmp_path: Path):
    tags = parsed(write_report(tmp_path / "report.html", report()))
    assert len(set(tags.alts)) == len(tags.alts) == 4 + 3 + 4 + 1
    assert {"Photo of the subject, 4", "After training: a photo of sks dog, 2", "Prior image, 3"} < set(
        tags.alts
    )
    assert "Preview after step 100: a row of samples for each prompt" in tags.alts


@pytest.mark.parametrize("key", NOTES)
def test_each_metric_is_explained_with_a_sign_of_trouble_and_what_to_do(tmp_path: Path, key: str):
    text = " ".join(parsed(write_report(tmp_path / "report.html", report(metrics={key: 0.5}))).text)
    note = NOTES[key]
    assert all(said in text for said in (note.name, note.unit, note.meaning, note.trouble, note.remedy))


@pytest.mark.parametrize(
    ("metrics", "seen"),
    [
        ({"class_drift": 0.06}, True),
        ({"class_drift": 0.04}, False),
        ({"diversity_ratio": 0.89}, True),
        ({"diversity_ratio": 0.91}, False),
        ({"class_shift": 0.21, "noise_floor": {"class_shift": 0.1}}, True),
        ({"class_shift": 0.19, "noise_floor": {"class_shift": 0.1}}, False),
        (
            {"class_shift": 0.1, "class_shift_unguided": 0.5}
            | {"noise_floor": {"class_shift": 0.1, "class_shift_unguided": 0.1}},
            True,
        ),
        (
            {"subject_fidelity": 0.6, "base": {"subject_fidelity": 0.3}, "ceiling": {"subject_fidelity": 1}},
            True,
        ),
        (
            {"subject_fidelity": 0.7, "base": {"subject_fidelity": 0.3}, "ceiling": {"subject_fidelity": 1}},
            False,
        ),
        ({"subject_fidelity": 0.1}, False),
        ({"prompt_fidelity": 0.8, "base": {"prompt_fidelity": 0.95}}, True),
        ({"prompt_fidelity": 0.9, "base": {"prompt_fidelity": 0.95}}, False),
        ({"pres": 0.5, "base": {"pres": 0.4}}, True),
        ({"pres": 0.42, "base": {"pres": 0.4}}, False),
        ({"clip_t": 0.27, "base": {"clip_t": 0.3}}, True),
        ({"div": 0.5, "base": {"div": 0.52}}, False),
    ],
)
def test_trouble_is_seen_where_the_sign_is_there(tmp_path: Path, metrics: dict, seen: bool):
    page = write_report(tmp_path / "report.html", report(metrics=metrics)).read_text(encoding="utf-8")
    assert ("Trouble, seen here" in page) is seen


def test_a_shift_stands_beside_its_noise_floor_everywhere(tmp_path: Path):
    shift = {"class_shift": 0.12, "noise_floor": {"class_shift": 0.05}}
    online = {"measures": [{"step": 100, "class_shift": 0.34, "score": 0.5}], "best_step": 100}
    metrics = (
        shift
        | online
        | {"measures_noise_floor": {"class_shift": 0.21}, "evaluate_also": {"guidance 4": shift}}
    )
    page = write_report(tmp_path / "report.html", report(metrics=metrics))
    text = " ".join(parsed(page).text)
    assert "noise floor 0.05" in text and text.count("0.12 (noise floor 0.05)") == 2
    assert "After step 100 · class shift 0.34 (noise floor 0.21)" in text
    assert 'class="floor line-0"' in page.read_text(encoding="utf-8")


def test_a_sampling_that_leaves_metrics_out_has_empty_cells(tmp_path: Path):
    """`{diversity: false, class_samples: 0}` of an evaluation of photographs."""
    main = {"dino": 0.61, "pres": 0.42, "div": 0.53}
    metrics = main | {"evaluate_also": {"quick": {"dino": 0.57}}}
    page = write_report(tmp_path / "report.html", report(metrics=metrics)).read_text(encoding="utf-8")
    rows = [" ".join(row.split()) for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)]
    row = '<th scope="row">{}</th><td>{}</td><td>{}</td><td>{}</td>'
    assert row.format("as configured", "0.61", "0.42", "0.53") in rows
    assert row.format("quick", "0.57", "", "") in rows


def test_curves_have_units_and_a_flat_one_is_told_in_words(tmp_path: Path):
    curves = {name: [(k, k % 7 + 1.0) for k in range(20)] for name in CURVES}
    curves |= {"lr/unet": [(k, 1e-4) for k in range(20)], "lr/text_encoder": [(3, 5e-5)], "odd": [(0, 1.0)]}
    curves["train/prior_loss"] = [(0, float("nan"))]
    page = write_report(tmp_path / "report.html", report(curves=curves))
    text = " ".join(parsed(page).text)
    assert all(note.name in text and note.unit in text for note in CURVES.values())
    assert "0.0001 throughout" in text and "5e-05 at step 3" in text and "no value is a number" in text
    assert "Learning rate, unet" in text and "Learning rate, text encoder" in text
    assert text.count("optimizer step ") + text.count("optimizer step<") >= len(CURVES) - 1


def test_any_run_makes_a_page_of_five_megabytes_at_most(tmp_path: Path):
    """Many samples and large previews of noise, which no format compresses, and long curves."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8))
    rows = [Row("prompt 0", [noise] * 20, [noise] * 20)]
    grid = noise.resize((1024, 2048))
    curves = {"train/subject_loss": [(k, (k * 7919) % 1000 / 1000) for k in range(100_000)]}
    page = write_report(
        tmp_path / "report.html",
        report(rows=rows, previews=[grid] * 4, preview_steps=range(4), curves=curves),
    )
    assert page.stat().st_size < 5_000_000
    tags = parsed(page)
    assert f"prompt 0 ({SHOWN_SAMPLES} of 20)" in " ".join(tags.text)
    assert len(tags.sources) == 4 + 3 + 2 * SHOWN_SAMPLES + 4
    width, height = size_of(tags.sources[4])
    assert 64 < width == height < 512


def test_an_installed_package_has_the_templates():
    """A wheel holds what setup.py names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    patterns = ast.literal_eval(re.search(r'"ldm\.reports": (\[.*?\])', text)[1])
    others = {path for path in (ROOT / "ldm/reports").rglob("*.*") if path.suffix not in (".py", ".pyc")}
    assert others == {path for pattern in patterns for path in (ROOT / "ldm/reports").glob(pattern)}
    assert {path.name for path in others} >= {"head.html", "run.html", "run.css", "search.html", "study.md"}
    assert any(name.startswith("jinja2") for name in project["project"]["dependencies"])
