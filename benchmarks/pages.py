"""What was measured, as the tables of `speed.md`."""

from collections.abc import Mapping, Sequence
from datetime import date

PEERS = {"script": "its script", "best": "its networks at best"}
HEAD = (
    "| case | speed: script, best | memory: script, best | ours, ms | images/s: ours, script, best "
    "| share of the floor's speed |\n|---|---|---|---|---|---|"
)


def speed_table(about: Mapping, results: Sequence[Mapping]) -> str:
    """Date, machine and versions, and a line for each case of `scripts/benchmark.py`."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    machine = f"{about['cores']} cores of {about['device']}, {about['precision']}, {versions}"
    lines = [f"{date.today()}, {machine}.", "", HEAD]
    for row in results:
        speed = f"{row['speed_ratio_script']:.2f}, {row['speed_ratio_best']:.2f}"
        memory = f"{row['memory_ratio_script']:.2f}, {row['memory_ratio_best']:.2f}"
        images = ", ".join(f"{row[side]['images_per_second']:.3g}" for side in ("ours", "script", "best"))
        share, ms = f"{row['ours']['share_of_floor']:.2f}", f"{row['ours']['ms']:,.0f}"
        lines.append(f"| {row['case']} | {speed} | {memory} | {ms} | {images} | {share} |")
    return "\n".join(lines)
