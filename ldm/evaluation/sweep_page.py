"""Results of a study: a CSV with a row per run, plots with intervals, and a page with paired differences."""

import csv
import io
from collections.abc import Mapping, Sequence
from html import escape

from ldm.evaluation.curves import ticks
from ldm.evaluation.statistics import MIN_SUBJECTS, Estimate, Row, mean_of, paired_difference

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 270, 56, 14, 34, 74
COLORS = ("#3b7dd8", "#d8663b", "#3ba56b", "#9b59b6", "#c9a227", "#5d6d7e", "#c0392b", "#16a085")


def to_csv(rows: Sequence[Row]) -> str:
    """One line per run, in the order given."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def table(rows: Sequence[Row], metrics: Sequence[str], seconds: Mapping[str, float]) -> str:
    """Markdown: a line per variant, the mean of each metric over subjects, mean seconds of training."""
    lines = _head("variant", [*map(spoken, metrics), "training, s"])
    for variant in variants_of(rows):
        cells = [_cell(mean_of(rows, variant, metric), ".3f") for metric in metrics]
        lines.append(f"| {variant} | {' | '.join(cells)} | {seconds[variant]:.0f} |")
    return "\n".join(lines)


def differences(rows: Sequence[Row], metrics: Sequence[str], baselines: Mapping[str, str]) -> str:
    """Markdown: a line per pair of variants, the paired difference of each metric; bold beyond its interval.

    baselines: variant -> the variant that it is compared with.
    """
    lines = _head("difference", list(map(spoken, metrics)))
    for variant, baseline in baselines.items():
        found = [paired_difference(rows, variant, baseline, metric) for metric in metrics]
        cells = [
            f"**{_cell(difference, '+.3f')}**" if difference.excludes_zero else _cell(difference, "+.3f")
            for difference in found
        ]
        lines.append(f"| {variant} - {baseline} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(
    name: str,
    *,
    title: str,
    claim: str,
    finding: str,
    command: str,
    made_at: str,
    rows: Sequence[Row],
    metrics: Sequence[str],
    seconds: Mapping[str, float],
    baselines: Mapping[str, str],
    pictures: Sequence[str],
) -> str:
    """The study in Markdown, beside its `name`.csv, its plots and its images."""
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    seeds = list(dict.fromkeys(str(row["seed"]) for row in rows))
    runs = f"{len(rows)} rows: subjects {', '.join(subjects)}; seeds {', '.join(seeds)}."
    if len(subjects) >= MIN_SUBJECTS:
        how = "the 95 % bootstrap interval over subjects; a difference in bold is beyond its interval"
    else:
        how = f"the value of each subject, in this order: {len(subjects)} are too few for an interval"
    made = (
        f"{runs} Means over subjects, in brackets {how}. Differences are paired by subject and seed. "
        f"Every run: [{name}.csv]({name}.csv)."
    )
    parts = [f"# {title}", f"**What is said.** {claim.strip()}"]
    parts += [f"**What we measured.** {finding.strip()}"] if finding.strip() else []
    parts += [table(rows, metrics, seconds)]
    parts += [differences(rows, metrics, baselines)] if baselines else []
    parts += [made, *(f"![]({picture})" for picture in pictures)]
    place = f" at {made_at.strip()}" if made_at.strip() else ""
    return "\n\n".join([*parts, f"Made by `{command}`{place}."]) + "\n"


def panels(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """An SVG with a panel per metric: a faint dot per run, the variants' means with their intervals."""
    drawn = [
        f'<g transform="translate({WIDTH * (k % 2)} {HEIGHT * (k // 2)})">{_panel(rows, metric)}</g>'
        for k, metric in enumerate(metrics)
    ]
    return _svg(drawn, WIDTH * min(2, len(metrics)), HEIGHT * -(-len(metrics) // 2))


def frontier(rows: Sequence[Row], across: str, up: str) -> str:
    """An SVG of one metric against another: the variants' means, with crosses of intervals."""
    x = _Axis([row[across] for row in rows], LEFT, WIDTH - RIGHT)
    y = _Axis([row[up] for row in rows], HEIGHT - BOTTOM, TOP)
    parts = [_text(WIDTH / 2, 18, f"{spoken(up)} against {spoken(across)}", bold=True), _y_ticks(y)]
    parts += [_text(x(v), HEIGHT - BOTTOM + 18, f"{v:g}") for v in x.ticks]
    parts.append(_text(WIDTH / 2, HEIGHT - BOTTOM + 40, spoken(across)))
    for k, variant in enumerate(variants_of(rows)):
        color = COLORS[k % len(COLORS)]
        a, b = mean_of(rows, variant, across), mean_of(rows, variant, up)
        if a.interval and b.interval:
            parts.append(_line(x(a.interval.low), y(b.mean), x(a.interval.high), y(b.mean), color))
            parts.append(_line(x(a.mean), y(b.interval.low), x(a.mean), y(b.interval.high), color))
        parts.append(f'<circle cx="{x(a.mean):.1f}" cy="{y(b.mean):.1f}" r="4.5" fill="{color}"/>')
        height = TOP + 16 * k + 10
        parts.append(f'<circle cx="{WIDTH + 12}" cy="{height - 4}" r="4.5" fill="{color}"/>')
        parts.append(_text(WIDTH + 22, height, variant, anchor="start"))
    return _svg(parts, WIDTH + 220, max(HEIGHT, TOP + 16 * len(variants_of(rows)) + 10))


def variants_of(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["variant"] for row in rows))


def spoken(metric: str) -> str:
    return metric.replace("_", " ")


def _head(first: str, columns: Sequence[str]) -> list[str]:
    return [f"| {first} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]


def _cell(estimate: Estimate, digits: str) -> str:
    """ "0.717 (0.63 to 0.79)", or the values of the subjects where they are too few for an interval."""
    short = digits.replace("3", "2")
    if estimate.interval:
        inside = f"{estimate.interval.low:{short}} to {estimate.interval.high:{short}}"
    else:
        inside = ", ".join(f"{value:{short}}" for value in estimate.by_subject.values())
    return f"{round(estimate.mean, 3) + 0.0:{digits}} ({inside})"  # no -0.000


class _Axis:
    """Values -> pixels, with round numbers at the ends."""

    def __init__(self, values: Sequence[float], first: float, last: float):
        low, high = min(values), max(values)
        self.ticks = ticks(low, high) if high > low else ticks(low - 0.5, high + 0.5)
        self.first = first
        self.last = last

    def __call__(self, value: float) -> float:
        share = (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
        return self.first + (self.last - self.first) * share


def _panel(rows: Sequence[Row], metric: str) -> str:
    variants = variants_of(rows)
    y = _Axis([row[metric] for row in rows], HEIGHT - BOTTOM, TOP)
    room = (WIDTH - LEFT - RIGHT) / len(variants)
    parts = [_text(WIDTH / 2, 18, spoken(metric), bold=True), _y_ticks(y)]
    for k, variant in enumerate(variants):
        x, found = LEFT + room * (k + 0.5), mean_of(rows, variant, metric)
        for n, row in enumerate(row for row in rows if row["variant"] == variant):
            aside = x - 9 + 2.5 * (n % 8)
            parts.append(f'<circle cx="{aside:.1f}" cy="{y(row[metric]):.1f}" r="2" fill="#9ab"/>')
        if found.interval:
            parts.append(_line(x, y(found.interval.low), x, y(found.interval.high), COLORS[0]))
        parts.append(f'<circle cx="{x:.1f}" cy="{y(found.mean):.1f}" r="4.5" fill="{COLORS[0]}"/>')
        turn = f'transform="rotate(-24 {x:.1f} {HEIGHT - BOTTOM + 16})"'
        parts.append(_text(x, HEIGHT - BOTTOM + 16, variant, anchor="end", more=turn))
    return "".join(parts)


def _y_ticks(y: _Axis) -> str:
    lines = (
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="#dde"/>'
        + _text(LEFT - 6, y(v) + 4, f"{v:g}", anchor="end")
        for v in y.ticks
    )
    return "".join(lines)


def _line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{color}" stroke-width="2"/>'


def _text(
    x: float, y: float, text: str, *, anchor: str = "middle", bold: bool = False, more: str = ""
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight} {more}>{escape(text)}</text>'


def _svg(parts: Sequence[str], width: float, height: float) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'font-family="sans-serif" font-size="12"><rect width="{width}" height="{height}" fill="white"/>'
        + "\n".join(parts)
        + "</svg>\n"
    )
