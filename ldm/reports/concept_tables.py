"""Tables of a run of several concepts: the metrics of each, and whose looks are drawn when it is asked."""

from collections.abc import Mapping
from typing import Any

from ldm.reports.metric_notes import METRICS


def concept_rows(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The headline metrics, a row for each concept; empty for a single subject.

    With the 95 % interval where there is one.
    """
    concepts = metrics.get("concepts", {})
    keys = [key for key in METRICS if any(key in found for found in concepts.values())]
    rows = {name: [_value(found, key) for key in keys] for name, found in concepts.items()}
    return {"names": [METRICS[key].name for key in keys], "rows": rows} if concepts else {}


def bleeding_table(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Asked x drawn: the trained model's shares with the base's; empty without them."""
    matrices = metrics.get("bleeding_matrix", {})
    trained, base = matrices.get("trained", {}), matrices.get("base", {})
    names = list(dict.fromkeys(name for row in trained.values() for name in row))
    rows = {
        asked: [f"{row[name]:.2f} ({base[asked][name]:.2f})" if name in row else "" for name in names]
        for asked, row in trained.items()
    }
    return {"names": names, "rows": rows} if rows else {}


def _value(found: Mapping[str, Any], key: str) -> str:
    if key not in found:
        return ""
    interval = found.get("intervals", {}).get(key)
    return f"{found[key]:.2f}" + (f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else "")
