"""Results of a study: a CSV with a row per run, plots with intervals, and a page with paired differences."""

import csv
import io
from collections.abc import Mapping, Sequence

from ldm.evaluation.statistics import MIN_SUBJECTS, Estimate, Row, mean_of, paired_difference
from ldm.reports import svg
from ldm.reports.render import render

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 270, 56, 14, 34, 74
COLORS = ("#3b7dd8", "#d8663b", "#3ba56b", "#9b59b6", "#c9a227", "#5d6d7e", "#c0392b", "#16a085")
RUN, GRID = "#9ab", "#dde"


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
    pictures: Mapping[str, str],
    read_at: Mapping[str, Sequence[float]],
) -> str:
    """The study in Markdown, beside its `name`.csv and its pictures, which are file -> text alternative.

    read_at: the metric and the values at which curves are read, or nothing.
    """
    return render(
        "study.md",
        name=name,
        title=title,
        claim=claim.strip(),
        finding=finding.strip(),
        table=table(rows, metrics, seconds),
        differences=differences(rows, metrics, baselines) if baselines else "",
        count=len(rows),
        subjects=list(dict.fromkeys(row["subject"] for row in rows)),
        seeds=list(dict.fromkeys(row["seed"] for row in rows)),
        min_subjects=MIN_SUBJECTS,
        read_at={spoken(metric): " and ".join(map("{:g}".format, read_at[metric])) for metric in read_at},
        unreached=_unreached(rows, read_at),
        pictures=pictures,
        command=command,
        made_at=made_at.strip(),
    )


def place_of(value: float, values: Sequence[float]) -> str:
    """How a row's name ends that is read at one of these values; of one alone, every row is."""
    return "" if len(values) == 1 else f", at {value:g}"


def _unreached(rows: Sequence[Row], read_at: Mapping[str, Sequence[float]]) -> int:
    """How many rows are of curves that never reach the value at which they are read."""
    found = 0
    for metric, values in read_at.items():
        for value in values:
            end = place_of(value, values)
            found += sum(row[metric] < value for row in rows if row["variant"].endswith(end))
    return found


def panels(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """An SVG with a panel per metric: a faint dot per run, the variants' means with their intervals."""
    drawn = [
        svg.element("g", *_panel(rows, metric), transform=f"translate({WIDTH * (k % 2)} {HEIGHT * (k // 2)})")
        for k, metric in enumerate(metrics)
    ]
    width, height = WIDTH * min(2, len(metrics)), HEIGHT * -(-len(metrics) // 2)
    return svg.document(drawn, width, height, label=panels_label(rows, metrics))


def frontier(rows: Sequence[Row], across: str, up: str) -> str:
    """An SVG of one metric against another: the variants' means, with crosses of intervals."""
    rows = [row for row in rows if None not in (row[across], row[up])]
    x = svg.Axis([row[across] for row in rows], LEFT, WIDTH - RIGHT)
    y = svg.Axis([row[up] for row in rows], HEIGHT - BOTTOM, TOP)
    parts = [_middle((WIDTH / 2, 18), frontier_label(across, up), font_weight="bold"), *_y_ticks(y)]
    parts += [_middle((x(v), HEIGHT - BOTTOM + 18), f"{v:g}") for v in x.ticks]
    parts.append(_middle((WIDTH / 2, HEIGHT - BOTTOM + 40), spoken(across)))
    for k, variant in enumerate(variants_of(rows)):
        color, height = COLORS[k % len(COLORS)], TOP + 16 * k + 10
        a, b = mean_of(rows, variant, across), mean_of(rows, variant, up)
        center = x(a.mean), y(b.mean)
        if a.interval and b.interval:
            cross = {"stroke": color, "stroke_width": 2}
            parts.append(svg.line((x(a.interval.low), center[1]), (x(a.interval.high), center[1]), **cross))
            parts.append(svg.line((center[0], y(b.interval.low)), (center[0], y(b.interval.high)), **cross))
        parts.append(svg.circle(center, 4.5, fill=color))
        parts.append(svg.circle((WIDTH + 12, height - 4), 4.5, fill=color))
        parts.append(svg.text((WIDTH + 22, height), variant))
    height = max(HEIGHT, TOP + 16 * len(variants_of(rows)) + 10)
    return svg.document(parts, WIDTH + 220, height, label=frontier_label(across, up))


def panels_label(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """What `panels` shows, for those who do not see it."""
    shown = ", ".join(map(spoken, metrics))
    return f"{shown[:1].upper()}{shown[1:]}, of each variant: {'; '.join(variants_of(rows))}"


def frontier_label(across: str, up: str) -> str:
    return f"{spoken(up)} against {spoken(across)}"


def variants_of(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["variant"] for row in rows))


def spoken(metric: str) -> str:
    return metric.replace("_", " ")


def _head(first: str, columns: Sequence[str]) -> list[str]:
    return [f"| {first} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]


def _cell(estimate: Estimate, digits: str) -> str:
    """ "0.717 (0.63 to 0.79)", or each subject's value where they are too few for an interval."""
    if not estimate.by_subject:
        return ""
    short = digits.replace("3", "2")
    if estimate.interval:
        inside = f"{estimate.interval.low:{short}} to {estimate.interval.high:{short}}"
    else:
        inside = ", ".join(f"{name} {value:{short}}" for name, value in estimate.by_subject.items())
    return f"{round(estimate.mean, 3) + 0.0:{digits}} ({inside})"  # no -0.000


def _panel(rows: Sequence[Row], metric: str) -> list[str]:
    rows = [row for row in rows if row[metric] is not None]
    variants = variants_of(rows)
    y = svg.Axis([row[metric] for row in rows], HEIGHT - BOTTOM, TOP)
    room = (WIDTH - LEFT - RIGHT) / len(variants)
    parts = [_middle((WIDTH / 2, 18), spoken(metric), font_weight="bold"), *_y_ticks(y)]
    for k, variant in enumerate(variants):
        x, found = LEFT + room * (k + 0.5), mean_of(rows, variant, metric)
        for n, row in enumerate(row for row in rows if row["variant"] == variant):
            parts.append(svg.circle((x - 9 + 2.5 * (n % 8), y(row[metric])), 2, fill=RUN))
        if found.interval:
            low, high = y(found.interval.low), y(found.interval.high)
            parts.append(svg.line((x, low), (x, high), stroke=COLORS[0], stroke_width=2))
        parts.append(svg.circle((x, y(found.mean)), 4.5, fill=COLORS[0]))
        place = x, HEIGHT - BOTTOM + 16
        turned = f"rotate(-24 {place[0]:.1f} {place[1]})"
        parts.append(svg.text(place, variant, text_anchor="end", transform=turned))
    return parts


def _y_ticks(y: svg.Axis) -> list[str]:
    lines = [svg.line((LEFT, y(v)), (WIDTH - RIGHT, y(v)), stroke=GRID) for v in y.ticks]
    return lines + [svg.text((LEFT - 6, y(v) + 4), f"{v:g}", text_anchor="end") for v in y.ticks]


def _middle(place: svg.Point, words: str, **attributes: str) -> str:
    return svg.text(place, words, text_anchor="middle", **attributes)
