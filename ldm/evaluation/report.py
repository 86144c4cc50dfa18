"""Report of a run: a self-contained HTML file with its images, metrics and curves."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageOps

from ldm.evaluation.curves import Curve, chart, together
from ldm.files import atomic_write

Images = Sequence[Image.Image]
PIXEL_ART = 128  # pixels a side up to which an image is shown without smoothing
# Pixels a side at most in the page: photos, which may be of a camera's size; samples; the width of a preview
PHOTO_SIDE, SAMPLE_SIDE, PREVIEW_WIDTH = 320, 512, 1024


class Row(NamedTuple):
    """One prompt: its samples before and after training."""

    prompt: str
    before: Images
    after: Images


class EvalHistory(NamedTuple):
    """Metrics of the evaluated steps, {"step", "score", ...}, and the step of the best score."""

    rows: Sequence[Mapping[str, float]] = ()
    best_step: int | None = None


@dataclass(frozen=True)
class Report:
    """What the page shows. `metrics` and `seconds` are those of metrics.json."""

    title: str
    subject: Images
    priors: Images
    rows: Sequence[Row]
    metrics: Mapping[str, Any]
    seconds: Mapping[str, float]
    curves: Mapping[str, Curve]
    config: str  # YAML
    previews: Sequence[tuple[int, Image.Image]] = field(default_factory=list)  # (optimizer step, grid)
    eval_history: EvalHistory = EvalHistory()
    also: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # the metrics under other sampling
    notes: Sequence[str] = ()  # what to know before looking at the rest


class Card(NamedTuple):
    """How a headline metric is shown."""

    name: str
    meaning: str
    scale: tuple[float, float]


CARDS = {
    "subject_fidelity": Card("Subject fidelity", "share of the subject's attributes that show", (0, 1)),
    "prompt_fidelity": Card("Prompt fidelity", "samples in the place that the prompt names", (0, 1)),
    "class_drift": Card("Class drift", "samples of the class that show the subject; 0 is best", (-0.2, 1)),
    "diversity_ratio": Card("Diversity", "of the class, relative to the base's", (0, 1.2)),
    "class_shift": Card(
        "Class shift",
        "how far the class has moved in any direction; 0 is best, up to chance is noise",
        (0, 1),
    ),
    "class_shift_frechet": Card(
        "Class shift, Fréchet", "of the judge's features; 0 is best, up to chance is noise", (0, 1)
    ),
}
EVAL_LABELS = {
    "subject_fidelity": "Subject",
    "prompt_fidelity": "Prompt",
    "class_drift": "Class drift",
    "diversity_ratio": "Diversity",
    "class_shift": "Class shift",
    "score": "Score",
}
CURVES = {
    "train/subject_loss": "Subject loss",
    "train/prior_loss": "Prior loss",
    "val/subject_loss": "Subject loss, fixed noise",
    "val/prior_loss": "Prior loss, fixed noise",
    "train/grad_norm": "Gradient norm",
    "train/images_per_second": "Images per second",
}


def write_report(path: Path, report: Report) -> Path:
    """Writes the page, which needs no other file and no network -> path."""
    css = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    sections = [
        ("", noted(report.notes)),
        ("", cards(report.metrics)),
        ("With other sampling", other_sampling(report.metrics, report.also)),
        ("The subject's photos", row(report.subject, side=PHOTO_SIDE)),
        ("Before and after", "".join(before_and_after(r) for r in report.rows)),
        ("During training", learning(report.eval_history, report.previews)),
        ("Prior images", row(report.priors, kind="small", side=PHOTO_SIDE)),
        ("Curves", charts(report.curves)),
        ("Time", times(report.seconds)),
        ("Config", f"<details><summary>config.yaml</summary><pre>{escape(report.config)}</pre></details>"),
    ]
    body = "".join((f"<h2>{name}</h2>" if name else "") + html for name, html in sections if html)
    title = escape(report.title)
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{css}</style></head><body><h1>{title}</h1>{body}</body></html>\n"
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def noted(notes: Sequence[str]) -> str:
    said = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f'<div class="note">{said}</div>' if notes else ""


def cards(metrics: Mapping[str, Any]) -> str:
    shown = [card(key, metrics) for key in CARDS if key in metrics]
    return f'<div class="cards">{"".join(shown)}</div>' if shown else ""


def card(key: str, metrics: Mapping[str, Any]) -> str:
    """A metric: its value, its gauge, and the values to compare it with."""
    about, value = CARDS[key], metrics[key]
    base, ceiling, chance = (metrics.get(name, {}).get(key) for name in ("base", "ceiling", "noise_floor"))
    if chance is not None:
        base = None  # a shift is relative to the base
    interval = metrics.get("intervals", {}).get(key)
    beside = [f"{interval[0]:.2f} to {interval[1]:.2f}"] if interval else []
    known = {"base": base, "photos": ceiling, "chance": chance}
    unguided = metrics.get(f"{key}_unguided")
    beside += [] if unguided is None else [f"without guidance {unguided:.2f}"]
    beside += [f"{name} {number:.2f}" for name, number in known.items() if number is not None]
    return (
        f'<div class="card"><div class="name">{about.name}</div><div class="value">{value:.2f}</div>'
        f"{gauge(value, chance if base is None else base, scale=about.scale)}"
        f'<div class="beside">{" · ".join(beside)}</div><div class="beside">{about.meaning}</div></div>'
    )


def other_sampling(metrics: Mapping[str, Any], also: Mapping[str, Mapping[str, Any]]) -> str:
    """The headline metrics, a row for each way of sampling."""
    if not also:
        return ""
    shown = [key for key in CARDS if key in metrics]
    head = "".join(f"<th>{CARDS[key].name}</th>" for key in shown)
    rows = [
        f"<tr><td>{escape(name)}</td>" + "".join(f'<td class="number">{f[key]:.2f}</td>' for key in shown)
        for name, f in {"as configured": metrics, **also}.items()
    ]
    return f"<table><tr><th></th>{head}</tr>{'</tr>'.join(rows)}</tr></table>"


def gauge(value: float, base: float | None, *, scale: tuple[float, float]) -> str:
    """A bar from 0 to the value, and a tick at the base's."""
    low, high = scale

    def at(number: float) -> float:
        return 100 * (min(max(number, low), high) - low) / (high - low)

    def block(kind: str, left: float, right: float) -> str:
        return f'<rect class="{kind}" x="{left:.1f}" width="{right - left:.1f}" height="10"/>'

    bar = block("track", 0, 100) + block("bar", *sorted((at(0), at(value))))
    bar += "" if base is None else block("tick", at(base) - 0.7, at(base) + 0.7)
    return f'<svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">{bar}</svg>'


def row(images: Images, *, kind: str = "", side: int = SAMPLE_SIDE) -> str:
    """Images beside each other, at most `side` pixels a side; they are read one after the other."""
    if not images:
        return ""
    shown = map(partial(img_tag, width=side, height=side), images)
    return f'<div class="row {kind}">{"".join(shown)}</div>'


def before_and_after(shown: Row) -> str:
    return (
        f"<figure><figcaption>{escape(shown.prompt)}</figcaption>"
        f'<div class="pair"><div class="tag">before</div>{row(shown.before)}'
        f'<div class="tag">after</div>{row(shown.after)}</div></figure>'
    )


def learning(eval_history: EvalHistory, previews: Sequence[tuple[int, Image.Image]]) -> str:
    """The metrics of every evaluated step as curves, then the previews of each step, with its metrics."""
    curves = {
        label: [(row["step"], row[name]) for row in eval_history.rows if name in row]
        for name, label in EVAL_LABELS.items()
    }
    curves = {label: curve for label, curve in curves.items() if curve}
    plot = ""
    if curves:
        said = f"The score was best after step {eval_history.best_step}, on few samples: see the previews."
        drawn = together(curves, mark=eval_history.best_step, label="Metrics at each evaluated step")
        plot = f'<figure class="half"><figcaption>{said}</figcaption>{drawn}</figure>'
    metrics = {row["step"]: row for row in eval_history.rows}
    return plot + "".join(preview(step, grid, metrics.get(step, {})) for step, grid in previews)


def preview(step: int, grid: Image.Image, metrics: Mapping[str, float]) -> str:
    said = [f"{label.lower()} {metrics[name]:.2f}" for name, label in EVAL_LABELS.items() if name in metrics]
    summary = " · ".join([f"After step {step}", *said])
    shown = img_tag(grid, width=PREVIEW_WIDTH)
    return f'<details><summary>{summary}</summary><div class="wide">{shown}</div></details>'


def charts(curves: Mapping[str, Curve]) -> str:
    lr = {name: "Learning rate" for name in curves if name.startswith("lr")}
    shown = [
        f"<figure><figcaption>{escape(label)}</figcaption>{chart(curves[name], label=label)}</figure>"
        for name, label in {**CURVES, **lr}.items()
        if name in curves
    ]
    return f'<div class="charts">{"".join(shown)}</div>' if shown else ""


def times(seconds: Mapping[str, float]) -> str:
    rows = {name.replace("_", " "): value for name, value in seconds.items()}
    rows["in all"] = sum(seconds.values())
    cells = (f'<tr><td>{escape(n)}</td><td class="number">{v:.1f} s</td></tr>' for n, v in rows.items())
    return f"<table>{''.join(cells)}</table>"


def img_tag(image: Image.Image, *, width: int, height: int | None = None) -> str:
    """An <img> with embedded data: PNG for small images, otherwise JPEG, no larger than width x height."""
    height = height or image.height
    if image.width > width or image.height > height:
        image = ImageOps.contain(image, (width, height), Image.Resampling.LANCZOS)
    small = max(image.size) <= PIXEL_ART
    data = io.BytesIO()
    image.convert("RGB").save(data, format="PNG" if small else "JPEG", **({} if small else {"quality": 88}))
    text = base64.b64encode(data.getvalue()).decode("ascii")
    kind = "png" if small else "jpeg"
    about = f'class="{"pixels" if small else "photo"}" width="{image.width}" height="{image.height}"'
    return f'<img alt="" {about} src="data:image/{kind};base64,{text}">'
