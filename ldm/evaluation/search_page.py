"""The page of a search: its best settings, the front, what mattered, and every trial with its pictures."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.evaluation.curves import chart
from ldm.evaluation.report import PREVIEW_WIDTH, img_tag
from ldm.evaluation.statistics import Row, mean_of
from ldm.evaluation.sweep_page import frontier, spoken


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
    kind = "Best settings" if len(metrics) == 1 else "The front"
    sections = {
        kind: _best(results, best, metrics),
        "What mattered": "".join(
            _table(
                [f"share in {spoken(metric)}", ""], [[key, f"{share:.2f}"] for key, share in shares.items()]
            )
            for metric, shares in importances.items()
        )
        or "<p>Too few trials are finished to tell.</p>",
        "Every trial": _trials(results, metrics),
    }
    body = f"<h1>{escape(title)}</h1><p>Made by <code>{escape(command)}</code>.</p>"
    body += "".join(f"<h2>{name}</h2>{html}" for name, html in sections.items())
    for number, sheet in pictures.items():
        shown = img_tag(sheet, width=PREVIEW_WIDTH)
        body += f'<details><summary>Trial {number}</summary><div class="wide">{shown}</div></details>'
    css = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{css}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _best(results: Sequence[Result], best: Mapping[int, str], metrics: Sequence[str]) -> str:
    """The best trials' settings; then the front beside the first trial, or the metric of every trial."""
    finished = [result for result in results if result.state == "finished"]
    parts = []
    for result in (result for result in finished if result.number in best):
        said = "\n".join(f"{key}: {value}" for key, value in result.settings.items())
        found = ", ".join(f"{spoken(metric)} {_value(result, metric)}" for metric in metrics)
        parts.append(f"<p>Trial {result.number}: {found}; {escape(best[result.number])}</p>")
        parts.append(f"<pre>{escape(said)}</pre>")
    if finished and len(metrics) == 2:
        shown = [row for r in finished if r.number in best or r.number == 0 for row in r.rows]
        parts.append(frontier(shown, metrics[1], metrics[0]))
    elif finished:
        parts.append(chart([(r.number, r.mean(metrics[0])) for r in finished], label=spoken(metrics[0])))
    return "".join(parts)


def _trials(results: Sequence[Result], metrics: Sequence[str]) -> str:
    """A table with a line per trial."""
    keys = list(dict.fromkeys(key for result in results for key in result.settings))
    lines = [
        [r.number, *(r.settings.get(key, "") for key in keys), *(_value(r, m) for m in metrics)]
        + [f"{r.seconds:.0f}", r.state + (f": {r.why}" if r.why else "")]
        for r in results
    ]
    return _table(["trial", *keys, *map(spoken, metrics), "s", ""], lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{escape(str(value))}</td>' for value in row)}</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def _value(result: Result, metric: str) -> str:
    """The mean over the subjects so far, with its interval where there are enough."""
    if not result.rows:
        return ""
    found = mean_of(result.rows, trial_name(result.number), metric)
    inside = f" ({found.interval.low:.3f} to {found.interval.high:.3f})" if found.interval else ""
    return f"{found.mean:.4f}{inside}"
