"""The run page in a browser, where there is one: nothing overflows, pictures load, text can be read."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from ldm.reports.metric_notes import METRICS
from ldm.reports.run_page import Report, Row, write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((found for found in map(shutil.which, BROWSERS) if found), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is on the PATH")

LIGHT, DARK = 1, 0  # of Blink's setting preferredColorScheme
MEASURE = """
const frame = document.createElement("iframe");  // a window may be no narrower than 500
frame.style = "border: 0; height: 3000px; width: WIDTHpx";
frame.srcdoc = PAGE;
frame.onload = () => {
  const page = frame.contentDocument, view = frame.contentWindow;
  page.querySelectorAll("details").forEach(details => details.open = true);
  const images = [...page.images];
  const number = text => text.match(/[0-9.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(
    v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4
  ).reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
  const ground = element => {
    for (let e = element; e; e = e.parentElement) {
      const color = number(view.getComputedStyle(e).backgroundColor);
      if (color.length == 3) return color;
    }
  };
  const contrast = element => {
    const style = view.getComputedStyle(element);
    const ink = light(number(element.namespaceURI.endsWith("svg") ? style.fill : style.color));
    const paper = light(ground(element));
    return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  };
  const texts = [...page.body.querySelectorAll("*")].filter(
    e => e.tagName != "STYLE" && [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim())
  );
  const box = e => { const b = e.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]; };
  const measured = {
    width: view.innerWidth,
    scroll_width: page.documentElement.scrollWidth,
    beyond: [...page.body.querySelectorAll("*")].filter(
      e => !e.closest(".scroll, pre") && e.getBoundingClientRect().right > view.innerWidth + 1
    ).map(e => e.outerHTML.slice(0, 80)),
    images: images.map(i => [i.complete, i.naturalWidth, i.naturalHeight, ...box(i)]),
    cut: [...page.querySelectorAll("svg text")].filter(e => {
      const [own, whole] = [e.getBoundingClientRect(), e.ownerSVGElement.getBoundingClientRect()];
      return own.left < whole.left || own.right > whole.right || own.bottom > whole.bottom;
    }).map(e => e.textContent),
    pairs: [...page.querySelectorAll(".pair")].map(pair => [...pair.children].map(box)),
    contrasts: texts.map(e => [contrast(e), e.textContent.trim().slice(0, 40)]),
    ground: ground(page.body),
  };
  document.body.innerHTML = "<pre id='measured'></pre>";
  document.body.firstChild.textContent = JSON.stringify(measured);
};
document.body.append(frame);
"""


def pictures(count: int, size: tuple[int, int] = (64, 64)) -> list[Image.Image]:
    return [Image.new("RGB", size, (30 * k, 80, 120)) for k in range(count)]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with all that a page can have, and long words."""
    found = dict.fromkeys(METRICS, 0.5) | {"class_shift_unguided": 0.4}
    beside = {"base": found, "ceiling": found, "intervals": {key: (0.4, 0.6) for key in found}}
    floors = {"class_shift": 0.1, "class_shift_unguided": 0.1}
    steps = (100, 200)
    metrics = found | beside | {"noise_floor": floors, "notes": ["The storybook has no " + "vase" * 40]}
    metrics |= {"evaluate_also": {"guidance 4": found}, "measures_noise_floor": floors, "best_step": 100}
    metrics |= {"measures": [{"step": step, **found, "score": 0.3} for step in steps]}
    metrics |= {"seconds": {"training": 12.0}, "phase_peak_memory_mib": {"training": 900.0}}
    prompt = "a photo of sks dog " + "on the moon, " * 20
    report = Report(
        title="rex: a photo of sks dog",
        facts={"Command": "python main.py --base configs/dreambooth.yaml " + "data.params.x=" + "y" * 200},
        photos={"sks dog": pictures(5, (800, 600))},
        priors=pictures(32),
        rows=[Row(prompt, pictures(n), pictures(n)) for n in (2, 6, 8)],
        metrics=metrics,
        curves={
            "train/subject_loss": [(k, 1 / k) for k in range(1, 90)],
            "val/subject_loss": [(k, 0.1 + 0.01 * k) for k in range(5)],
            "lr/unet": [(k, 1e-4) for k in range(5)],
        },
        config="name: " + "x" * 300,
        previews=pictures(2, (1400, 2100)),
        preview_steps=steps,
    )
    return write_report(tmp_path_factory.mktemp("page") / "report.html", report)


def measured(page: Path, width: int, scheme: int = LIGHT) -> dict:
    """What a browser makes of the page at this width of its window, in pixels."""
    text = json.dumps(page.read_text(encoding="utf-8")).replace("</", "<\\/")
    script = MEASURE.replace("WIDTH", str(width)).replace("PAGE", text)
    frame = page.with_name(f"frame-{width}-{scheme}.html")
    frame.write_text(f"<!doctype html><meta charset=utf-8><body><script>{script}</script>", encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'profile'}"]
    options += [f"--blink-settings=preferredColorScheme={scheme}"]
    command = [BROWSER, *options, "--window-size=1400,3000", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    (found,) = re.findall(r"<pre id=.measured.>(.*?)</pre>", done.stdout, re.DOTALL) or [None]
    assert found, f"the browser measured nothing: {done.stderr[-500:]}"
    return json.loads(html.unescape(found))


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_overflows_and_every_picture_is_there_in_proportion(page: Path, width: int):
    found = measured(page, width)
    assert found["width"] == width >= found["scroll_width"] and found["beyond"] == []
    assert found["cut"] == []
    assert len(found["images"]) == 5 + 32 + 2 * (2 + 6 + 8) + 2
    for complete, own_width, own_height, _, _, shown_width, shown_height in found["images"]:
        assert complete and own_width > 0 and shown_width > 20
        assert shown_height / shown_width == pytest.approx(own_height / own_width, rel=0.03)
    for (left, top, _, height), (left_after, top_after, _, _) in found["pairs"]:
        assert left == left_after and top + height <= top_after < top + height + 20


@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_all_text_can_be_read(page: Path, scheme: int):
    """WCAG 2.2, 1.4.3: a contrast of at least 4.5."""
    found = measured(page, 1280, scheme)
    assert (sum(found["ground"]) > 600) is (scheme == LIGHT)
    assert len(found["contrasts"]) > 80
    assert [(ratio, text) for ratio, text in found["contrasts"] if ratio < 4.5] == []


def test_what_is_wrong_is_seen(page: Path):
    wrong = page.with_name("wrong.html")
    text = page.read_text(encoding="utf-8").replace(
        "</body>", '<div style="width: 900px; color: #bbb">faint</div><img alt="" src="no.png"></body>'
    )
    wrong.write_text(text, encoding="utf-8")
    found = measured(wrong, 390)
    assert found["scroll_width"] > 390 and found["beyond"]
    assert found["images"][-1][1] == 0
    assert min(found["contrasts"])[1] == "faint" and min(found["contrasts"])[0] < 4.5
