"""The page of DreamBench: means over subjects beside the paper's, and every subject."""

import csv
import io
from collections.abc import Mapping, Sequence

from PIL import Image

from ldm.evaluation.dreambench import METRICS, PAPER
from ldm.evaluation.masc import CP
from ldm.evaluation.statistics import MIN_SUBJECTS, Row, mean_of
from ldm.reports.render import render
from ldm.reports.thumbnails import Group, embed

NAMES = {"dino": "DINO", "clip_i": "CLIP-I", "clip_t": "CLIP-T", "dinov2": "DINOv2", CP: "MaSC-CP"}
WIDTH, HEIGHT = 1100, 1400  # pixels: of a subject's sheet, at most
MOST_BYTES = 4_000_000  # of all sheets together


def measured(rows: Sequence[Row]) -> list[str]:
    """The metrics of a table: masked consistency only where every subject has it."""
    return [*METRICS, *([CP] if rows and all(CP in row for row in rows) else [])]


def dreambench_csv(rows: Sequence[Row]) -> str:
    """A line for each subject."""
    text = io.StringIO()
    metrics = measured(rows)
    columns = ["subject", *metrics, *(f"photos_{name}" for name in metrics if name != "clip_t"), "images"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([row.get(column, "") for column in columns] for row in rows)
    return text.getvalue()


def table_of(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """(name, a cell for each metric): what was measured, the photos, then the rows of the paper."""
    metrics = measured(rows)
    photos = [{**row, **{m: row[f"photos_{m}"] for m in metrics if f"photos_{m}" in row}} for row in rows]
    lacking = {m for m in metrics if any(f"photos_{m}" not in row for row in rows)}
    own = [_cell(rows, metric) for metric in metrics]
    beside = ["" if metric in lacking else _cell(photos, metric) for metric in metrics]
    paper = [
        (name, [f"{found[m]:.3f}" if m in found else "" for m in metrics]) for name, found in PAPER.items()
    ]
    return [("Measured here", own), ("These photos with one another", beside), *paper]


def _cell(rows: Sequence[Row], metric: str) -> str:
    """The mean over subjects, with its 95 % interval where there are enough of them."""
    found = mean_of(rows, rows[0]["variant"], metric)
    inside = f" ({found.interval.low:.3f} to {found.interval.high:.3f})" if found.interval else ""
    return f"{found.mean:.3f}{inside}"


def dreambench_page(
    title: str,
    *,
    command: str,
    rows: Sequence[Row],
    notes: Sequence[str],
    sheets: Mapping[str, Image.Image],
) -> str:
    """One HTML file, which needs no other. notes: how this differs from the protocol. sheets: by subject."""
    groups = {n: Group([sheet], [f"Images of {n}"], WIDTH, HEIGHT) for n, sheet in sheets.items()}
    metrics = measured(rows)
    subjects = [(row["subject"], [f"{row[metric]:.3f}" for metric in metrics]) for row in rows]
    return render(
        "dreambench.html",
        title=title,
        command=command,
        names=[NAMES[metric] for metric in metrics],
        has_masked=CP in metrics,
        means=table_of(rows),
        subjects=subjects,
        notes=notes,
        has_intervals=len(rows) >= MIN_SUBJECTS,
        pictures=embed(groups, most_bytes=MOST_BYTES),
    )
