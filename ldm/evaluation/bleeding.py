"""Metrics of several concepts: means over them, and the bleeding matrix, which subject's looks are drawn when
another is asked for.

Bleeding from B to A: share of the pictures of A's prompt that show B's value, over the attributes in which A
and B differ, minus that share of the untouched base.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from ldm.evaluation.metrics import Reading, matches

NEITHER = "neither"  # column of the matrix: no subject's value

Wanted = Mapping[str, Mapping[str, int]]  # name of a subject -> its attributes
Matrix = dict[str, dict[str, float]]  # asked -> drawn -> share


def matrix_of(subjects: Mapping[str, Reading], classes: Mapping[str, Reading], wanted: Wanted) -> Matrix:
    """The bleeding matrix of one model.

    subjects: name -> what the judge reads in pictures of its prompt. classes: the same by class word. The
    share of another subject is over the attributes in which it differs from the one that is asked for; one
    that differs in none has no entry. A class has the row "any dog", since a subject may be named "dog".
    """
    rows = {name: _row(reading, wanted, asked=name) for name, reading in subjects.items()}
    of_classes = {f"any {word}": _row(reading, wanted, asked=None) for word, reading in classes.items()}
    return rows | of_classes | rows  # in this order, and a subject has its own row whatever its name


def _row(reading: Reading, wanted: Wanted, *, asked: str | None) -> dict[str, float]:
    """Share of each subject's values in pictures, and of values that are no subject's."""
    row = {}
    for name, values in wanted.items():
        own = wanted[asked] if asked not in (None, name) else {}
        apart = {key: value for key, value in values.items() if own.get(key) != value}
        if apart:
            row[name] = round(float(matches(reading, apart).float().mean()), 4)
    known = torch.stack([matches(reading, values) for values in wanted.values()]).any(0)
    return row | {NEITHER: round(1 - float(known.float().mean()), 4)}


def bleeding_of(trained: Matrix, base: Matrix, names: Sequence[str]) -> dict[str, float]:
    """Bleeding into each subject, the mean over the others; without those that differ from no other."""
    found = {}
    for name in names:
        others = [other for other in names if other != name and other in trained[name]]
        if others:
            risen = [trained[name][other] - base[name][other] for other in others]
            found[name] = round(fmean(risen), 4)
    return found


def mean_metrics(values: Sequence[Any]) -> Any:
    """The mean of what `metrics.json` holds of several concepts: of numbers, also in mappings and lists.

    Ends of intervals are averaged too, which is never too narrow, whatever the concepts have in common.
    """
    first = values[0]
    if isinstance(first, Mapping):
        keys = [key for key in first if all(key in value for value in values)]
        return {key: mean_metrics([value[key] for value in values]) for key in keys}
    if isinstance(first, list | tuple):
        return [mean_metrics(column) for column in zip(*values, strict=True)]
    return round(fmean(values), 4) if isinstance(first, float) else first


def combined(summaries: Mapping[str, Mapping[str, Any]], bleeding: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of several concepts: the means, the bleeding, and those of each in `concepts`.

    bleeding: what an evaluation says of it, {"bleeding": name -> value, "bleeding_matrix": ...}, or nothing.
    """
    own = bleeding.get("bleeding", {})
    concepts = {
        name: {**summary, **({"bleeding": own[name]} if name in own else {})}
        for name, summary in summaries.items()
    }
    means = mean_metrics(list(summaries.values()))
    if own:
        means |= {"bleeding": round(fmean(own.values()), 4), "bleeding_matrix": bleeding["bleeding_matrix"]}
    return {**means, "concepts": concepts}
