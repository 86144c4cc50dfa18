"""The page of a run: whole in itself, everything on it, nothing of it able to break it."""

import base64
import io
import re
import weakref
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from ldm.data import images
from ldm.evaluation.curves import chart, read_curves, smooth, ticks
from ldm.evaluation.plot import metrics_plot
from ldm.evaluation.report import PHOTO_SIDE, PREVIEW_WIDTH, Report, Row, write_report

METRICS = {
    "subject_fidelity": 0.87,
    "prompt_fidelity": 0.94,
    "class_drift": 0.02,
    "diversity_ratio": 0.97,
    "intervals": {"subject_fidelity": [0.84, 0.9]},
    "base": {"subject_fidelity": 0.31, "prompt_fidelity": 0.97, "class_drift": 0.0, "diversity_ratio": 1.0},
    "ceiling": {"subject_fidelity": 1.0},
}


class Tags(HTMLParser):
    """Checks that tags are closed in the order they were opened; collects the pictures' sources."""

    VOID = {"meta", "img", "br", "line", "rect", "polyline"}

    def __init__(self) -> None:
        super().__init__()
        self.open, self.sources, self.text = [], [], []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag == "img":
            self.sources.append(dict(attrs)["src"])
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
        "subject": pictures(4),
        "priors": pictures(3),
        "rows": [Row("a photo of sks dog", pictures(2), pictures(2))],
        "metrics": METRICS,
        "seconds": {"prior_images": 12.5, "training": 30.0},
        "curves": {"train/subject_loss": [(k, 0.3 / (k + 1)) for k in range(40)]},
        "config": "name: rex\n",
        "previews": [(100, pictures(1, side=300)[0])],
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
    tags = parsed(write_report(tmp_path / "report.html", report(rows=[], priors=[], previews=[])))
    shown = [Image.open(io.BytesIO(base64.b64decode(s.split(",")[1]))) for s in tags.sources]
    assert [image.tobytes() for image in shown] == [image.tobytes() for image in pictures(4)]


def test_figures_stand_with_what_they_compare_to(tmp_path: Path):
    text = " ".join(parsed(write_report(tmp_path / "report.html", report())).text)
    assert "0.87" in text and "0.84 to 0.90" in text and "base 0.31" in text and "photos 1.00" in text
    assert "42.5 s" in text  # 12.5 + 30


def test_a_run_without_figures_priors_or_previews(tmp_path: Path):
    page = write_report(tmp_path / "report.html", report(metrics={}, priors=[], previews=[], curves={}))
    text = " ".join(parsed(page).text)
    assert "Subject fidelity" not in text and "Prior images" not in text and "During training" not in text


def test_text_cannot_become_markup(tmp_path: Path):
    evil = '<img src="http://x"> & "quotes"'
    page = write_report(
        tmp_path / "report.html",
        report(title=evil, config=evil, rows=[Row(evil, pictures(1), pictures(1))], previews=[]),
    )
    tags = parsed(page)
    assert all(source.startswith("data:") for source in tags.sources)
    assert " ".join(tags.text).count(evil) >= 3


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0, 1, [0, 0.5, 1]),
        (0, 200, [0, 50, 100, 150, 200]),
        (-0.2, 0.9, [-0.5, 0, 0.5, 1]),
        (0, 0.0001, None),
        (0, 7, None),
    ],
)
def test_ticks_are_round_and_enclose(low: float, high: float, expected: list[float] | None):
    marks = ticks(low, high)
    assert marks[0] <= low and marks[-1] >= high - 1e-12
    assert 3 <= len(marks) <= 7
    if expected is not None:
        assert marks == pytest.approx(expected)


def test_smoothing_keeps_a_line_straight_and_its_length():
    line = [(k, 2.0 * k) for k in range(20)]
    assert smooth(line, window=5)[2:-2] == line[2:-2]
    assert len(smooth(line, window=5)) == 20


@pytest.mark.parametrize(
    "curve", [[(0, 1.0)], [(0, 0.0), (1, 0.0)], [(0, -1.0), (5, float("nan")), (9, 2.0)]], ids=str
)
def test_odd_curves_stay_inside_the_chart(curve: list[tuple[int, float]]):
    groups = re.findall(r'points="([^"]*)"', chart(curve, label="x"))
    points = [float(number) for group in groups for number in re.split("[ ,]", group)]
    assert points
    assert all(0 <= x <= 400 for x in points[::2])
    assert all(0 <= y <= 190 for y in points[1::2])


def test_no_curve_is_no_chart():
    assert chart([(0, float("inf"))], label="x") == ""


def test_a_resumed_runs_files_are_merged_and_the_later_wins(tmp_path: Path):
    for suffix, start, value in ((".0", 0, 1.0), (".1", 3, 2.0)):
        writer = SummaryWriter(str(tmp_path), filename_suffix=suffix)
        for step in range(start, start + 5):
            writer.add_scalar("train/loss", value, step)
        writer.close()
    assert read_curves(tmp_path) == {"train/loss": [(k, 1.0 if k < 3 else 2.0) for k in range(8)]}


def test_the_plot_of_an_evaluation_holds_every_figure_inside_its_frame():
    metrics = {
        "subject_fidelity": 0.8,
        "class_drift": -0.1,
        "intervals": {"subject_fidelity": [0.7, 0.9]},
        "base": {"subject_fidelity": 0.2, "class_drift": 0.0},
        "ceiling": {"subject_fidelity": 1.0},
    }
    root = ElementTree.fromstring(metrics_plot(metrics))
    *_, width, height = map(float, root.attrib["viewBox"].split())
    circles = [e for e in root.iter() if e.tag.endswith("circle")]
    assert len(circles) == 2 and len([e for e in root.iter() if e.tag.endswith("line")]) == 2 + 1 + 3
    high, low = (float(circle.attrib["cx"]) for circle in circles)
    assert 0 < low < high < width and all(0 < float(c.attrib["cy"]) < height for c in circles)


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
    page = write_report(tmp_path / "report.html", report(subject=photos, priors=photos[:2]))
    assert page.stat().st_size < 5 * 2**20
    assert (held.most, held.now) == (1, 0)
    shown = [size_of(source) for source in parsed(page).sources[:30]]
    assert set(shown) == {(PHOTO_SIDE, PHOTO_SIDE * 3 // 4)}


def size_of(source: str) -> tuple[int, int]:
    return Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).size


@pytest.mark.parametrize("size", [(800, 600), (600, 800), (2500, 25), (320, 320), (129, 40)])
def test_thumbnails_keep_their_proportions_and_small_photos_their_size(tmp_path: Path, size: tuple):
    photo = Image.new("RGB", size, "red")
    page = write_report(tmp_path / "report.html", report(subject=[photo], priors=[], rows=[], previews=[]))
    width, height = size_of(parsed(page).sources[0])
    assert max(width, height) == min(PHOTO_SIDE, max(size))
    assert width / height == pytest.approx(size[0] / size[1], rel=0.5 / min(width, height))
    assert photo.size == size  # the report changes nothing that it is given


def test_a_preview_has_its_own_proportions(tmp_path: Path):
    """An image of a given width whose height stays that of the attribute is stretched."""
    grid = Image.new("RGB", (1400, 4000), "red")
    page = write_report(tmp_path / "report.html", report(previews=[(100, grid)]))
    width, height = size_of(parsed(page).sources[-4])
    assert width == PREVIEW_WIDTH and abs(height - 4000 * width / 1400) <= 1
    style = page.read_text(encoding="utf-8").split("<style>")[1].split("</style>")[0]
    css = re.findall(r"([^{}]*img[^{}]*)\{([^}]*)\}", style)
    scaled = [rules for _, rules in css if re.search(r"(?<!-)\bwidth:", rules) or "max-width:" in rules]
    wide = next(rules for selector, rules in css if ".wide" in selector)
    assert "height: auto" in wide and "max-width: 100%" in wide and scaled


def test_what_a_run_has_to_say_stands_at_the_top(tmp_path: Path):
    notes = ["The storybook has no <vase>.", "Another one."]
    page = write_report(tmp_path / "report.html", report(notes=notes))
    tags = parsed(page)
    text = " ".join(tags.text)
    assert all(note in text for note in notes)
    assert text.index("Another one.") < text.index("Subject fidelity")
    assert 'class="note"' not in write_report(tmp_path / "other.html", report()).read_text(encoding="utf-8")
