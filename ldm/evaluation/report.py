"""What a run did, on one page: a self-contained HTML file with its pictures, figures and curves."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ldm.evaluation.curves import Curve, chart, together
from ldm.files import atomic_write

Pictures = Sequence[Image.Image]
PIXEL_ART = 128  # pixels a side up to which a picture is shown with its pixels


class Row(NamedTuple):
    """One prompt: its pictures before and after training."""

    prompt: str
    before: Pictures
    after: Pictures


class Measured(NamedTuple):
    """Figures of steps on the way, {"step", "score", ...}, and the step of the best score."""

    rows: Sequence[Mapping[str, float]] = ()
    best_step: int | None = None


@dataclass(frozen=True)
class Report:
    """What the page shows. `figures` and `seconds` are those of metrics.json."""

    title: str
    subject: Pictures
    priors: Pictures
    rows: Sequence[Row]
    figures: Mapping[str, Any]
    seconds: Mapping[str, float]
    curves: Mapping[str, Curve]
    config: str  # YAML
    previews: Sequence[tuple[int, Image.Image]] = field(default_factory=list)  # (optimizer step, sheet)
    measured: Measured = Measured()
    also: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # the metrics under other sampling


class Card(NamedTuple):
    """How a headline figure is told."""

    name: str
    meaning: str
    scale: tuple[float, float]


CARDS = {
    "subject_fidelity": Card("Subject fidelity", "share of the subject's traits that show", (0, 1)),
    "prompt_fidelity": Card("Prompt fidelity", "pictures in the place asked for", (0, 1)),
    "class_drift": Card("Class drift", "pictures of the class that became the subject; 0 is best", (-0.2, 1)),
    "diversity_ratio": Card("Diversity", "of the class, relative to the base's", (0, 1.2)),
    "class_shift": Card(
        "Class shift", "how far the class has moved in any direction; chance is best", (0, 1)
    ),
    "class_shift_frechet": Card("Class shift, Fréchet", "of the judge's features; chance is best", (0, 1)),
}
MEASURED = {
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
        ("", cards(report.figures)),
        ("With other sampling", other_sampling(report.figures, report.also)),
        ("The subject's photos", row(report.subject)),
        ("Before and after", "".join(before_and_after(r) for r in report.rows)),
        ("While it learned", learning(report.measured, report.previews)),
        ("Prior images", row(report.priors, kind="small")),
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


def cards(figures: Mapping[str, Any]) -> str:
    shown = [card(key, figures) for key in CARDS if key in figures]
    return f'<div class="cards">{"".join(shown)}</div>' if shown else ""


def card(key: str, figures: Mapping[str, Any]) -> str:
    """A figure, its gauge, and what stands beside it."""
    about, value = CARDS[key], figures[key]
    base, ceiling, chance = (figures.get(name, {}).get(key) for name in ("base", "ceiling", "noise_floor"))
    if chance is not None:
        base = None  # a shift is relative to the base
    interval = figures.get("intervals", {}).get(key)
    beside = [f"{interval[0]:.2f} to {interval[1]:.2f}"] if interval else []
    known = {"base": base, "photos": ceiling, "chance": chance}
    unguided = figures.get(f"{key}_unguided")
    beside += [] if unguided is None else [f"without guidance {unguided:.2f}"]
    beside += [f"{name} {number:.2f}" for name, number in known.items() if number is not None]
    return (
        f'<div class="card"><div class="name">{about.name}</div><div class="value">{value:.2f}</div>'
        f"{gauge(value, chance if base is None else base, scale=about.scale)}"
        f'<div class="beside">{" · ".join(beside)}</div><div class="beside">{about.meaning}</div></div>'
    )


def other_sampling(figures: Mapping[str, Any], also: Mapping[str, Mapping[str, Any]]) -> str:
    """The headline metrics once more, a row for each way of sampling."""
    if not also:
        return ""
    shown = [key for key in CARDS if key in figures]
    head = "".join(f"<th>{CARDS[key].name}</th>" for key in shown)
    rows = [
        f"<tr><td>{escape(name)}</td>" + "".join(f'<td class="number">{f[key]:.2f}</td>' for key in shown)
        for name, f in {"as configured": figures, **also}.items()
    ]
    return f"<table><tr><th></th>{head}</tr>{'</tr>'.join(rows)}</tr></table>"


def gauge(value: float, base: float | None, *, scale: tuple[float, float]) -> str:
    """A bar from 0 to the value, and a tick where the base stands."""
    low, high = scale

    def at(number: float) -> float:
        return 100 * (min(max(number, low), high) - low) / (high - low)

    def block(kind: str, left: float, right: float) -> str:
        return f'<rect class="{kind}" x="{left:.1f}" width="{right - left:.1f}" height="10"/>'

    bar = block("track", 0, 100) + block("bar", *sorted((at(0), at(value))))
    bar += "" if base is None else block("tick", at(base) - 0.7, at(base) + 0.7)
    return f'<svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">{bar}</svg>'


def row(pictures: Pictures, *, kind: str = "") -> str:
    if not pictures:
        return ""
    return f'<div class="row {kind}">{"".join(map(picture, pictures))}</div>'


def before_and_after(shown: Row) -> str:
    return (
        f"<figure><figcaption>{escape(shown.prompt)}</figcaption>"
        f'<div class="pair"><div class="tag">before</div>{row(shown.before)}'
        f'<div class="tag">after</div>{row(shown.after)}</div></figure>'
    )


def learning(measured: Measured, previews: Sequence[tuple[int, Image.Image]]) -> str:
    """The figures of every measured step as curves, then what was drawn at each step, with its figures."""
    curves = {
        label: [(row["step"], row[name]) for row in measured.rows if name in row]
        for name, label in MEASURED.items()
    }
    curves = {label: curve for label, curve in curves.items() if curve}
    plot = ""
    if curves:
        said = f"The score was best after step {measured.best_step}: few pictures, so look at them as well."
        drawn = together(curves, mark=measured.best_step, label="Figures at each measured step")
        plot = f'<figure class="half"><figcaption>{said}</figcaption>{drawn}</figure>'
    figures = {row["step"]: row for row in measured.rows}
    return plot + "".join(preview(step, sheet, figures.get(step, {})) for step, sheet in previews)


def preview(step: int, sheet: Image.Image, figures: Mapping[str, float]) -> str:
    said = [f"{label.lower()} {figures[name]:.2f}" for name, label in MEASURED.items() if name in figures]
    summary = " · ".join([f"After step {step}", *said])
    return f'<details><summary>{summary}</summary><div class="wide">{picture(sheet)}</div></details>'


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


def picture(image: Image.Image) -> str:
    """An <img> that holds its data: PNG where pixels count, else JPEG."""
    small = max(image.size) <= PIXEL_ART
    data = io.BytesIO()
    image.convert("RGB").save(data, format="PNG" if small else "JPEG", **({} if small else {"quality": 88}))
    text = base64.b64encode(data.getvalue()).decode("ascii")
    kind = "png" if small else "jpeg"
    about = f'class="{"pixels" if small else "photo"}" width="{image.width}" height="{image.height}"'
    return f'<img alt="" {about} src="data:image/{kind};base64,{text}">'
