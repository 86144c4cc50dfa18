"""The page of a search: its best settings, the front, what mattered, and every trial with its pictures."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ldm.evaluation.statistics import Row, mean_of
from ldm.reports.charts import chart
from ldm.reports.render import render
from ldm.reports.sweep_plots import frontier, spoken
from ldm.reports.thumbnails import Group, embed

WIDTH, HEIGHT = 1100, 1400  # pixels: of a trial's sheet, at most
MOST_BYTES = 4_000_000  # of all sheets together


def trial_name(number: int) -> str:
    """As its rows and, with hyphens, the folders of its runs have it."""
    return f"trial {number:04d}"


@dataclass(frozen=True)
class Result:
    """A trial: `rows` are those of its finished runs; why: it ended early; seconds: that it took."""

    number: int
    state: str  # finished, pruned, unfinished
    settings: Mapping[str, Any]
    rows: Sequence[Row]
    why: str = ""
    seconds: float = 0.0

    def mean(self, metric: str) -> float:
        """Over subjects, each the mean of its seeds."""
        return mean_of(self.rows, trial_name(self.number), metric).mean


def to_csv(results: Sequence[Result], metrics: Sequence[str]) -> str:
    """One line per trial: its state, settings, metrics and seconds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    keys = list(dict.fromkeys(key for result in results for key in result.settings))
    writer.writerow(["trial", "state", *keys, *metrics, "seconds"])
    for result in results:
        values = [_value(result, metric) for metric in metrics]
        settings = [result.settings.get(key, "") for key in keys]
        writer.writerow([result.number, result.state, *settings, *values, f"{result.seconds:.0f}"])
    return text.getvalue()


def page(
    title: str,
    *,
    command: str,
    metrics: Sequence[str],
    results: Sequence[Result],
    best: Mapping[int, str],
    importances: Mapping[str, Mapping[str, float]],
    pictures: Mapping[int, Image.Image],
) -> str:
    """The search as one HTML file, which needs no other.

    best: trial -> the config file of its settings. importances: metric -> key -> share. pictures: trial ->
    sheet of its samples.
    """
    finished = [result for result in results if result.state == "finished"]
    keys = list(dict.fromkeys(key for result in results for key in result.settings))
    groups = {n: Group([sheet], [f"Samples of trial {n}"], WIDTH, HEIGHT) for n, sheet in pictures.items()}
    shown = [(r, [_value(r, m) for m in metrics], best[r.number]) for r in finished if r.number in best]
    return render(
        "search.html",
        title=title,
        command=command,
        metrics=[spoken(metric) for metric in metrics],
        keys=keys,
        rows=[_line(result, keys, metrics) for result in results],
        best=shown,
        plot=_plot(finished, best, metrics),
        importances={spoken(metric): shares for metric, shares in importances.items()},
        pictures=embed(groups, most_bytes=MOST_BYTES),
    )


def _line(result: Result, keys: Sequence[str], metrics: Sequence[str]) -> list[Any]:
    """A trial's line of the table."""
    settings = [result.settings.get(key, "") for key in keys]
    state = result.state + (f": {result.why}" if result.why else "")
    values = [_value(result, metric) for metric in metrics]
    return [result.number, *settings, *values, f"{result.seconds:.0f}", state]


def _plot(finished: Sequence[Result], best: Mapping[int, str], metrics: Sequence[str]) -> str:
    """The front beside the first trial, or the metric of every trial."""
    if finished and len(metrics) == 2:
        shown = [row for r in finished if r.number in best or r.number == 0 for row in r.rows]
        return frontier(shown, metrics[1], metrics[0])
    if finished:
        points = [(r.number, r.mean(metrics[0])) for r in finished]
        return chart(points, label=spoken(metrics[0]), along="trial", smoothed=False)
    return ""


def _value(result: Result, metric: str) -> str:
    """The mean over the subjects so far, with its interval where there are enough."""
    if not result.rows:
        return ""
    found = mean_of(result.rows, trial_name(result.number), metric)
    inside = f" ({found.interval.low:.3f} to {found.interval.high:.3f})" if found.interval else ""
    return f"{found.mean:.4f}{inside}"
