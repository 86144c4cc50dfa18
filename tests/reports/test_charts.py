"""Charts: round numbers, curves inside their frames, SVG that any reader parses."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from ldm.reports import charts, svg
from ldm.reports.charts import chart, together
from ldm.reports.curves import read_curves, smooth, thin
from ldm.reports.metrics_plot import metrics_plot
from ldm.reports.search_page import Result, page, trial_name
from ldm.reports.svg import ticks


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0, 1, [0, 0.5, 1]),
        (0, 200, [0, 50, 100, 150, 200]),
        (-0.2, 0.9, [-0.5, 0, 0.5, 1]),
        (0, 0.0001, None),
        (0, 7, None),
    ],
)
def test_ticks_are_round_and_enclose(low: float, high: float, expected: list[float] | None):
    marks = ticks(low, high)
    assert marks[0] <= low and marks[-1] >= high - 1e-12
    assert 3 <= len(marks) <= 7
    if expected is not None:
        assert marks == pytest.approx(expected)


def test_smoothing_keeps_a_line_straight_and_its_length():
    line = [(k, 2.0 * k) for k in range(20)]
    assert smooth(line, window=5)[2:-2] == line[2:-2]
    assert len(smooth(line, window=5)) == 20


@pytest.mark.parametrize(
    "curve", [[(0, 1.0)], [(0, 0.0), (1, 0.0)], [(0, -1.0), (5, float("nan")), (9, 2.0)]], ids=str
)
def test_odd_curves_stay_inside_the_chart(curve: list[tuple[int, float]]):
    groups = re.findall(r'points="([^"]*)"', chart(curve, label="x"))
    points = [float(number) for group in groups for number in re.split("[ ,]", group)]
    assert points
    assert all(0 <= x <= 400 for x in points[::2])
    assert all(0 <= y <= 190 for y in points[1::2])


def test_no_curve_is_no_chart():
    assert chart([(0, float("inf"))], label="x") == ""


def test_a_resumed_runs_files_are_merged_and_the_later_wins(tmp_path: Path):
    for suffix, start, value in ((".0", 0, 1.0), (".1", 3, 2.0)):
        writer = SummaryWriter(str(tmp_path), filename_suffix=suffix)
        for step in range(start, start + 5):
            writer.add_scalar("train/loss", value, step)
        writer.close()
    assert read_curves(tmp_path) == {"train/loss": [(k, 1.0 if k < 3 else 2.0) for k in range(8)]}


def test_the_plot_of_an_evaluation_holds_every_figure_inside_its_frame():
    metrics = {
        "subject_fidelity": 0.8,
        "class_drift": -0.1,
        "intervals": {"subject_fidelity": [0.7, 0.9]},
        "base": {"subject_fidelity": 0.2, "class_drift": 0.0},
        "ceiling": {"subject_fidelity": 1.0},
    }
    root = ElementTree.fromstring(metrics_plot(metrics))
    *_, width, height = map(float, root.attrib["viewBox"].split())
    circles = [e for e in root.iter() if e.tag.endswith("circle")]
    assert len(circles) == 2 and len([e for e in root.iter() if e.tag.endswith("line")]) == 2 + 1 + 3
    assert "with 95 % interval" in metrics_plot(metrics)
    assert "interval" not in metrics_plot({**metrics, "intervals": {}})
    high, low = (float(circle.attrib["cx"]) for circle in circles)
    assert 0 < low < high < width and all(0 < float(c.attrib["cy"]) < height for c in circles)


def test_a_chart_begins_where_there_is_something_to_see():
    """Not at step 0 and value 0; 0 is shown where the values come near it."""
    numbers = [
        float(n) for n in re.findall(r">([-0-9.]+)</text>", chart([(400, 0.81), (500, 0.83)], label="x"))
    ]
    assert 0 not in numbers and {0.81, 0.83, 400, 500} <= set(numbers)
    near = re.findall(r">([-0-9.]+)</text>", chart([(400, 0.1), (500, 0.83)], label="x"))
    assert "0" in near


def test_a_single_peak_sets_no_scale():
    curve = [(k, 1000.0 if k == 50 else 1.0 + 0.01 * (k % 5)) for k in range(1000)]
    numbers = [float(n) for n in re.findall(r'text-anchor="end">([-0-9.]+)</text>', chart(curve, label="x"))]
    assert max(numbers) <= 20


def test_few_points_are_dots():
    assert chart([(0, 1.0), (9, 2.0)], label="x").count("<circle") == 2
    assert "<circle" not in chart([(k, float(k)) for k in range(100)], label="x")


def test_trials_are_called_so_and_have_no_running_mean():
    """Neighbours have nothing in common: each of 32 is a dot at its own height."""
    values = [0.9 if k % 2 else 0.1 for k in range(32)]
    results = [Result(k, "finished", {}, [row_of(k, value)]) for k, value in enumerate(values)]
    parts = {"command": "", "best": {}, "importances": {}, "pictures": {}}
    drawn = page("rates", metrics=["dino"], results=results, **parts)
    heights = [float(y) for y in re.findall(r'<circle[^>]* cy="([0-9.]+)"', drawn)]
    assert len(heights) == 32 and len(set(heights)) == 2 and max(heights) - min(heights) > 50
    assert 'aria-label="dino, by trial"' in drawn and ">trial</text>" in drawn
    assert "optimizer step" not in drawn and 'class="raw"' not in drawn
    line = re.search(r'points="([^"]*)"', drawn)[1].split()
    assert [float(point.split(",")[1]) for point in line] == heights


def row_of(trial: int, value: float) -> dict:
    return {"variant": trial_name(trial), "subject": "rex", "seed": 1, "dino": value}


def test_a_thinned_curve_keeps_its_ends_and_its_extremes():
    curve = [(k, float((k * 37) % 101)) for k in range(5000)] + [(5000, 999.0), (5001, -9.0)]
    short = thin(curve, most=300)
    assert len(short) <= 300 and {999.0, -9.0} <= {value for _, value in short}
    assert [step for step, _ in short] == sorted(step for step, _ in short)
    assert short[0][0] < 40 and short[-1] == (5001, -9.0)
    assert thin(curve[:300], most=300) == curve[:300]


def test_names_of_curves_that_end_together_do_not_overlap():
    curves = {f"name {k}": [(0, 0.5), (9, 0.5 + 0.001 * k)] for k in range(8)}
    drawn = together(curves, mark=9, floors={"name 1": 0.2}, label="x")
    heights = sorted(float(y) for y in re.findall(r'y="([0-9.]+)" class="name-', drawn))
    assert len(heights) == 8 and all(b - a >= 13 for a, b in zip(heights, heights[1:], strict=False))
    assert heights[0] > 0 and heights[-1] <= charts.HEIGHT


def test_text_and_attributes_are_escaped():
    drawn = svg.document([svg.text((1, 2), '<b> & "c"', class_="x")], 10, 10, label='a "b" <c>')
    root = ElementTree.fromstring(drawn)
    assert root.attrib["aria-label"] == 'a "b" <c>' and root.attrib["font-family"] == "sans-serif"
    (text,) = [e for e in root.iter() if e.tag.endswith("text")]
    assert text.text == '<b> & "c"' and text.attrib == {"x": "1", "y": "2", "class": "x"}
