"""Results of a study: a CSV with a row per run, and a page with means, intervals and paired differences."""

import csv
import io
from collections.abc import Mapping, Sequence

from ldm.evaluation.statistics import MIN_SUBJECTS, Estimate, Row, mean_of, paired_difference
from ldm.reports.render import render
from ldm.reports.sweep_plots import spoken, variants_of


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
