"""The metrics of `metrics.json` as rows of a table, each with what it is compared with."""

from collections.abc import Mapping
from typing import Any, NamedTuple

BESIDE = ("base", "ceiling", "noise_floor")  # of the untouched base, of the photos, of other seeds


class MetricRow(NamedTuple):
    """interval: "0.950 to 0.990", or "". beside: number by the keys of BESIDE, where there is one."""

    name: str
    value: float
    interval: str
    beside: Mapping[str, float]


def metric_rows(metrics: Mapping[str, Any]) -> list[MetricRow]:
    """A row for each metric, in the order of `metrics`."""
    intervals = metrics.get("intervals", {})
    rows = []
    for name, value in metrics.items():
        if isinstance(value, float):
            interval = "{:.3f} to {:.3f}".format(*intervals[name]) if intervals.get(name) else ""
            beside = {key: metrics[key][name] for key in BESIDE if name in metrics.get(key, {})}
            rows.append(MetricRow(name, value, interval, beside))
    return rows
