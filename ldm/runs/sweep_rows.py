"""The rows of a study's table: what a finished run measured, of each subject, at its end or on its curve."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from ldm.errors import UserError
from ldm.evaluation.statistics import Row
from ldm.reports.sweep_page import place_of
from ldm.runs.grid import Job, metric_of
from ldm.runs.sweep import Sweep, name_of_lora


def rows_of(sweep: Sweep, job: Job, metrics: Mapping[str, Any]) -> list[Row]:
    """The rows of one run, from its metrics.json: one for each subject in it, and again of each sampling.

    One of several subjects is named "variant, group", one of another sampling "variant, sampling", one of
    several places on the curve "variant, at 0.8", one of a LoRA of its model "variant as LoRA 4". What only
    runs of several subjects have, such as bleeding, is None of the others. Raises UserError for metrics that
    the run does not have.
    """
    rows = []
    for name, subject, found in _measured(sweep, job, metrics):
        row = {"variant": name, "subject": subject, "seed": job.seed}
        judged = any(metric in found for metric in sweep.metrics)
        lone = judged and bool(sweep.groups) and job.subject not in sweep.groups
        for metric in sweep.metrics:
            absent = lone and metric not in found
            row[metric] = None if absent else metric_of(found, metric, where=job.folder)
        rows.append(row)
    return rows


def _measured(
    sweep: Sweep, job: Job, metrics: Mapping[str, Any]
) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(row's name, subject, its metrics) of a run."""
    for metric, values in sweep.at.items():
        for value in values:
            name = job.variant + place_of(value, values)
            yield name, job.subject, read_at(curve_of(metrics), metric, value)
        return
    name = f"{job.variant}, {job.subject}" if job.subject in sweep.groups else job.variant
    also = metrics.get("evaluate_also", {})
    for sampling, found in {"": metrics, **also}.items():
        full = f"{name}, {sampling}" if sampling else name
        if job.subject not in sweep.groups:
            yield full, job.subject, found
        else:
            for subject, own in found["concepts"].items():
                yield full, subject, own
    for rank in sweep.extracted.get(job.variant, ()):
        yield name_of_lora(job.variant, rank), job.subject, metrics["extracted"][rank]


def curve_of(metrics: Mapping[str, Any]) -> list[Mapping[str, float]]:
    """The rows of a run's online evaluation, after those of the untouched base at step 0."""
    return [{"step": 0, **metrics["base"]}, *metrics["measures"]]


def read_at(curve: Sequence[Mapping[str, float]], metric: str, value: float) -> dict[str, float]:
    """All metrics where one first reaches a value, on straight lines between evaluations.

    The last row of a curve that never does. Raises UserError for a metric that the curve does not have.
    """
    if metric not in curve[0]:
        raise UserError(
            f"The curves have no `{metric}`", where="at", remedy=f"Choose of {', '.join(curve[0])}."
        )
    if curve[0][metric] >= value:
        return dict(curve[0])
    for before, after in pairwise(curve):
        if after[metric] >= value:
            share = (value - before[metric]) / (after[metric] - before[metric])
            both = [key for key in before if key in after]
            return {key: round(before[key] + share * (after[key] - before[key]), 4) for key in both}
    return dict(curve[-1])
