"""The page of a run: one self-contained HTML file with its images, metrics and curves."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

from PIL import Image

from ldm.files import atomic_write
from ldm.reports.charts import chart, gauge, together
from ldm.reports.concept_tables import bleeding_table, concept_rows
from ldm.reports.curves import Curve, finite, is_flat
from ldm.reports.metric_notes import METRICS, UNGUIDED, curve_notes, measured, notes_of, signs_of_trouble
from ldm.reports.render import render
from ldm.reports.thumbnails import Group, Picture, embed

Images = Sequence[Image.Image]
# Pixels a side at most in the page: photos, which may be of a camera's size; samples; grids of previews
PHOTO_SIDE, SAMPLE_SIDE, PREVIEW_WIDTH, PREVIEW_HEIGHT = 320, 512, 1024, 8192
SHOWN_SAMPLES = 16  # of each prompt; all are in samples/
IMAGE_BYTES = 4_500_000  # of all images of a page, in base64
ALT_LENGTH = 120  # characters of a text alternative
ONLINE = "score"  # beside the metrics themselves, what checkpoints are ranked by


class Row(NamedTuple):
    """One prompt: its samples before and after training."""

    prompt: str
    before: Images
    after: Images


@dataclass(frozen=True)
class Report:
    """What the page shows.

    facts: name -> value, what stands at the top: date, command, base. photos: those of each concept by its
    name. metrics: those of metrics.json. config: as YAML. previews: a grid for each of `preview_steps`.
    """

    title: str
    facts: Mapping[str, str]
    photos: Mapping[str, Images]
    priors: Images
    rows: Sequence[Row]
    metrics: Mapping[str, Any]
    curves: Mapping[str, Curve]
    config: str
    previews: Images = field(default_factory=list)
    preview_steps: Sequence[int] = ()


def write_report(path: Path, report: Report) -> Path:
    """Writes the page, which needs no other file and no network, and is of 5 MB at most -> path."""
    shown, metrics = embed(dict(_groups(report)), most_bytes=IMAGE_BYTES), report.metrics
    page = render(
        "run.html",
        title=report.title,
        facts=report.facts,
        notes=metrics.get("notes", []),
        cards=cards(metrics),
        other_sampling=other_sampling(metrics),
        photos={name: shown["photos", name] for name in report.photos},
        concepts=concept_rows(metrics),
        bleeding=bleeding_table(metrics),
        samples=[
            {
                "prompt": row.prompt,
                "pairs": pairs(shown["before", k], shown["after", k]),
                "all": len(row.after),
            }
            for k, row in enumerate(report.rows)
        ],
        learning=learning(metrics),
        best_step=metrics.get("best_step"),
        previews=list(previews(metrics, report.preview_steps, shown["previews"])),
        priors=shown["priors"],
        curves=list(charts(report.curves)),
        seconds=metrics.get("seconds", {}),
        peaks=metrics.get("phase_peak_memory_mib", {}),
        config=report.config,
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _groups(report: Report) -> Iterator[tuple[Any, Group]]:
    """The images of the page, with their text alternatives."""

    def group(images: Images, what: str, width: int, height: int) -> Group:
        alts = [f"{shorten(what, ALT_LENGTH)}, {k}" for k in range(1, len(images) + 1)]
        return Group(images, alts, width, height)

    for name, photos in report.photos.items():
        what = "Photo of the subject" if len(report.photos) == 1 else f"Photo of {name}"
        yield ("photos", name), group(photos, what, PHOTO_SIDE, PHOTO_SIDE)
    yield "priors", group(report.priors, "Prior image", PHOTO_SIDE, PHOTO_SIDE)
    for k, row in enumerate(report.rows):
        for when, images in (("before", row.before), ("after", row.after)):
            what, some = f"{when.capitalize()} training: {row.prompt}", images[:SHOWN_SAMPLES]
            yield (when, k), group(some, what, SAMPLE_SIDE, SAMPLE_SIDE)
    alts = [f"Preview after step {step}: a row of samples for each prompt" for step in report.preview_steps]
    yield "previews", Group(report.previews, alts, PREVIEW_WIDTH, PREVIEW_HEIGHT)


def pairs(before: Sequence[Picture], after: Sequence[Picture]) -> list[tuple[Picture, Picture]]:
    """The samples of one seed before and after training."""
    return list(zip(before, after, strict=True))


def cards(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The headline metrics: value, gauge, the values to compare it with, and what it says."""
    troubled = set(signs_of_trouble(metrics))
    return [
        {
            "note": note,
            "value": f"{metrics[key]:.2f}",
            "gauge": gauge(metrics[key], _tick(metrics, key), scale=note.scale),
            "beside": list(_beside(metrics, key)),
            "trouble_seen": key in troubled,
        }
        for key, note in notes_of(metrics).items()
    ]


def _tick(metrics: Mapping[str, Any], key: str) -> float | None:
    found = measured(metrics, key)
    return found.base if found.noise_floor is None else found.noise_floor


def _beside(metrics: Mapping[str, Any], key: str) -> Iterator[str]:
    """The values that stand beside a metric."""
    found = measured(metrics, key)
    if interval := metrics.get("intervals", {}).get(key):
        yield f"{interval[0]:.2f} to {interval[1]:.2f}"
    for name, value in (("base", found.base), ("photos", found.photos), ("noise floor", found.noise_floor)):
        if value is not None:
            yield f"{name} {value:.2f}"
    if (unguided := metrics.get(key + UNGUIDED)) is not None:
        yield f"without guidance {unguided:.2f}{_floor(metrics, key + UNGUIDED)}"


def _floor(metrics: Mapping[str, Any], key: str) -> str:
    floor = metrics.get("noise_floor", {}).get(key)
    return "" if floor is None else f" (noise floor {floor:.2f})"


def other_sampling(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A table of the headline metrics, a row for each way of sampling; empty if there is one.

    A way of sampling that leaves a metric out has an empty cell.
    """
    also = metrics.get("evaluate_also", {})
    keys = [key for key in METRICS if key in metrics]
    rows = {
        how: [f"{found[key]:.2f}{_floor(found, key)}" if key in found else "" for key in keys]
        for how, found in {"as configured": metrics, **also}.items()
    }
    return {"names": [METRICS[key].name for key in keys], "rows": rows} if also else {}


def learning(metrics: Mapping[str, Any]) -> str:
    """A chart of the metrics at every evaluated step; empty without online evaluation."""
    history = metrics.get("measures", [])
    curves = {
        name: [(row["step"], row[key]) for row in history if key in row]
        for key, name in _online_names(metrics).items()
    }
    floors = {
        METRICS[key].name: floor
        for key, floor in metrics.get("measures_noise_floor", {}).items()
        if key in METRICS
    }
    curves = {name: curve for name, curve in curves.items() if curve}
    label = "Metrics at each evaluated step"
    return together(curves, mark=metrics.get("best_step"), floors=floors, label=label) if curves else ""


def previews(
    metrics: Mapping[str, Any], steps: Sequence[int], shown: Sequence[Picture]
) -> Iterator[tuple[str, Picture]]:
    """(what to say of it, its grid) for each preview, with the metrics of its step."""
    history = {row["step"]: row for row in metrics.get("measures", [])}
    floors = {"noise_floor": metrics.get("measures_noise_floor", {})}
    for step, picture in zip(steps, shown, strict=True):
        row = history.get(step, {})
        known = [
            f"{name.lower()} {row[key]:.2f}{_floor(floors, key)}"
            for key, name in _online_names(metrics).items()
            if key in row
        ]
        yield " · ".join([f"After step {step}", *known]), picture


def _online_names(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Metrics that are told of each evaluated step; of the two measures of a shift, one."""
    names = {key: note.name for key, note in METRICS.items()} | {ONLINE: "Score"}
    if any("class_shift" in row for row in metrics.get("measures", [])):
        del names["class_shift_frechet"]
    return names


def charts(curves: Mapping[str, Curve]) -> Iterator[dict[str, Any]]:
    """The curves of a run: a chart each, or the value where it is always the same."""
    for name, note in curve_notes(curves).items():
        curve = finite(curves[name])
        if not curve:
            yield {"note": note, "chart": "", "value": "no value is a number"}
        elif is_flat(curve):
            where = f"at step {curve[0][0]}" if len(curve) == 1 else "throughout"
            yield {"note": note, "chart": "", "value": f"{curve[0][1]:.3g} {where}"}
        else:
            yield {"note": note, "chart": chart(curve, label=note.name), "value": ""}
