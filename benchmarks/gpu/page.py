"""The results of the check as a page and a plot: `python -m benchmarks.gpu.page [RESULTS]`.

Without RESULTS, of what is kept in benchmarks/gpu/results.jsonl, if anything is.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.check import PARTS
from benchmarks.plot import plot
from ldm.files import atomic_write

HERE = Path(__file__).resolve().parent
KEPT = HERE / "results.jsonl"
HOW = """One command runs all parts, each in a process and a time limit of its own, within so many seconds:

    bash benchmarks/gpu/check.sh 900

and one part or several: `bash benchmarks/gpu/check.sh 300 env agree train`. It needs the packages of this
repository, `diffusers` and `peft`; wheels of what a machine lacks may lie in `.whl/`. It leaves
`results.jsonl`, the log, profiles and this page in `$OUT` (`logs/gpu-check`).
`CHECK_DEVICE=cpu CHECK_SIZE=storybook` runs all that a CPU can, which the tests do with the short parts. To
keep results: copy `results.jsonl` to `benchmarks/gpu/` and run `python -m benchmarks.gpu.page`. The
storybook's base is trained when it is asked for: `bash benchmarks/gpu/check.sh 300 storybook_base`.

`1+1` is a batch of one photo and one prior image; `kernel by kernel` is without CUDA graphs, for which the
goals are. A floor is computed: the FLOP and bytes at the best rates of an H100."""


@dataclass(frozen=True)
class Goal:
    """A number to reach, of Stable Diffusion 1.5 at 512 pixels on an H100."""

    label: str
    part: str
    what: str
    key: str
    scale: float  # of the figure, to the unit of the goal
    unit: str
    floor: str
    most: float
    published: str = "none"


GOALS = (
    Goal("step 1+1, UNet and text encoder", "train", "1+1, full", "ms", 1, "ms", "15.3", 30),
    Goal("step 1+1, LoRA", "train", "1+1, LoRA", "ms", 1, "ms", "4.4", 20, "SimpleTuner 181"),
    Goal("the same, memory", "train", "1+1, LoRA", "peak_mib", 1 / 1024, "GiB", "", 2, "SimpleTuner 2.87"),
    Goal("50 steps with guidance, 1 image", "sample", "sampling, batch 1", "ms", 1e-3, "s", "0.104", 0.36,
         "ONNX Runtime 0.572; stable-fast 0.478, UNet alone"),
    Goal("the same, 8 images", "sample", "sampling, batch 8", "ms", 1e-3, "s", "0.831", 1.85),
    Goal("200 prior images on disk", "sample", "prior images on disk", "s_per_image", 200, "s", "21", 45),
)  # fmt: skip


def read(path: Path) -> list[dict]:
    """The results in a file; none where there is no file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def page(results: Sequence[Mapping]) -> str:
    """Markdown: where it was measured, the goals, and every part's figures."""
    lines = ["# On a GPU", ""]
    gpus = list(dict.fromkeys(row["gpu"] for row in results if "gpu" in row))
    if not results:
        lines += ["**Nothing has been measured on a GPU yet.** Floors are calculated, goals are goals.", ""]
    elif not gpus:
        lines += ["**These figures are a CPU's**, from a trial of the check: none is of a GPU.", ""]
    else:
        days = ", ".join(dict.fromkeys(row["date"] for row in results if "date" in row))
        lines += [f"Measured on: {', '.join(gpus)}{days and f' ({days})'}. The plot is `gpu.svg`.", ""]
    lines += [HOW, "", "## Goals", "", *_goals(results if gpus else [])]
    for part in [*PARTS, *sorted({row["part"] for row in results} - set(PARTS))]:
        rows = [row for row in results if row["part"] == part]
        if rows:
            lines += ["", f"## {part}", "", *_table(rows)]
    return "\n".join(lines) + "\n"


def _goals(results: Sequence[Mapping]) -> list[str]:
    head = "| Stable Diffusion 1.5 at 512 pixels | floor, H100 | goal, H100 | published | measured |"
    lines = [head, "|---|---|---|---|---|"]
    for goal in GOALS:
        found = [row[goal.key] for row in results if _is(row, goal) and goal.key in row]
        measured = f"{goal.scale * found[-1]:.3g} {goal.unit}" if found else "not yet"
        floor = f"{goal.floor} {goal.unit}" if goal.floor else ""
        most = f"≤ {goal.most:g} {goal.unit}"
        lines.append(f"| {goal.label} | {floor} | {most} | {goal.published} | {measured} |")
    caps = {row["what"]: "fits" if row.get("fits") else "fails" for row in results if row["part"] == "caps"}
    caps.pop("all of the part", None)
    said = "; ".join(f"{what}: {answer}" for what, answer in caps.items())
    lines.append(f"| presets in their cards' memory | | fit | | {said or 'not yet'} |")
    return lines


def _is(row: Mapping, goal: Goal) -> bool:
    return row["part"] == goal.part and row["what"] == goal.what


def _table(rows: Sequence[Mapping]) -> list[str]:
    """Rows of the same figures under one head."""
    lines, head = [], None
    for row in rows:
        figures = {key: value for key, value in row.items() if key not in ("part", "what")}
        if list(figures) != head:
            head = list(figures)
            lines += ([""] if lines else []) + [f"| | {' | '.join(head)} |", f"|{'---|' * (len(head) + 1)}"]
        lines.append(f"| {row['what']} | {' | '.join(_shown(value) for value in figures.values())} |")
    return lines


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, dict):
        text = ", ".join(f"{key}: {_shown(inner)}" for key, inner in value.items()) or "none"
    elif isinstance(value, list):
        text = ", ".join(_shown(inner) for inner in value)
    else:
        text = str(value)
    return text.replace("|", "/").replace("\n", " ")


def picture(results: Sequence[Mapping]) -> str:
    """Milliseconds of every training step, and of sampling an image."""
    steps = {row["what"]: {"ms": row["ms"]} for row in results if row["part"] == "train" and "ms" in row}
    for row in results:
        if row["part"] == "sample" and "images_per_s" in row:
            steps[f"{row['what']}, an image"] = {"ms": 1000 / row["images_per_s"]}
    return plot(
        steps, "Milliseconds of a training step, and of an image" if steps else "Nothing measured yet"
    )


def main(results: Path, out: Path) -> None:
    """Writes gpu.md and gpu.svg into `out`."""
    rows = read(results)
    for name, text in (("gpu.md", page(rows)), ("gpu.svg", picture(rows))):
        with atomic_write(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(out / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="?", type=Path, default=KEPT, help="a results.jsonl")
    parser.add_argument("--out", type=Path, default=HERE.parent, help="folder of gpu.md and gpu.svg")
    options = parser.parse_args()
    main(options.results, options.out)
