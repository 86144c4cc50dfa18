"""Rows of a study: subjects of a variant's own, several subjects in one run, and curves read at a value."""

import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.reports import sweep_page, sweep_plots
from ldm.runs import sweep_results as study
from ldm.runs.sweep import baselines_of, jobs_of, read_sweep
from ldm.runs.sweep_rows import read_at, rows_of
from tests.runs.test_sweep import BOTH, CONTENT, ROWS, write


def test_a_variant_can_have_subjects_of_its_own(workdir: Path):
    variants = {"alone": [], "two": ["trainer.max_steps=9"]}
    only = {"alone": ["rex", "car"], "two": ["both"]}
    sweep = read_sweep(write(workdir, subjects=BOTH, variants=variants, only=only))
    runs = [(job.variant, job.subject) for job in jobs_of(sweep) if job.seed == 1]
    assert runs == [("alone", "rex"), ("alone", "car"), ("two", "both")]
    rows = ["alone", "alone, guidance 4", "two, both", "two, both, guidance 4"]
    assert baselines_of(sweep, rows) == {"two, both": "alone", "two, both, guidance 4": "alone, guidance 4"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"only": {"no": ["rex"]}}, "`no` of `only` is not a variant.*Weight 0, weight 1"),
        ({"only": {"weight 1": ["max"]}}, "`max` of `only: weight 1` is not a subject.*rex, car"),
        ({"only": {"weight 1": []}}, "`` of `only: weight 1` is not a subject"),
        ({"at": {"subject_fidelity": [0.8], "prompt_fidelity": [0.8]}}, "read at values of one"),
        ({"at": {"background_leak": [0.1]}}, "read at values of one of `metrics`"),
        ({"at": {"subject_fidelity": []}}, "read at values of one of `metrics`"),
        ({"at": {"subject_fidelity": 0.8}}, "should be Mapping of str, Sequence of float"),
        ({"at": {"subject_fidelity": [0.8]}, "subjects": BOTH}, "and of single subjects"),
        (
            {"at": {"subject_fidelity": [0.8]}, "set": ["online_eval.every_steps=0"]},
            "`Weight 0` keeps no curve",
        ),
    ],
)
def test_choices_of_subjects_and_of_curves_are_checked(workdir: Path, changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        jobs_of(read_sweep(write(workdir, **changes)))


def test_runs_of_several_subjects_have_a_row_for_each(workdir: Path):
    metrics = ["subject_fidelity", "bleeding"]
    variants, only = {"alone": [], "two": []}, {"alone": ["rex", "car"], "two": ["both"]}
    sweep = read_sweep(
        write(workdir, subjects=BOTH, variants=variants, only=only, metrics=metrics, seeds=[1])
    )
    alone, _, two = jobs_of(sweep)
    found = rows_of(sweep, alone, {"subject_fidelity": 0.9})
    assert found == [
        {"variant": "alone", "subject": "rex", "seed": 1, "subject_fidelity": 0.9, "bleeding": None}
    ]
    with pytest.raises(UserError, match="has no `subject_fidelity`"):
        rows_of(sweep, alone, {"notes": ["cannot be judged"]})
    concepts = {
        "rex": {"subject_fidelity": 0.7, "bleeding": 0.1},
        "car": {"subject_fidelity": 0.8, "bleeding": -0.1},
    }
    found = rows_of(sweep, two, {"subject_fidelity": 0.75, "concepts": concepts})
    assert [(row["variant"], row["subject"], row["subject_fidelity"], row["bleeding"]) for row in found] == [
        ("two, both", "rex", 0.7, 0.1),
        ("two, both", "car", 0.8, -0.1),
    ]
    with pytest.raises(UserError, match="has no `subject_fidelity`"):
        rows_of(sweep, two, {"concepts": {"rex": {"bleeding": 0.1}}})


CURVE = [
    {"step": 0, "fidelity": 0.2, "drift": 0.0},
    {"step": 10, "fidelity": 0.6, "drift": 0.1},
    {"step": 20, "fidelity": 1.0, "drift": 0.3},
    {"step": 30, "fidelity": 0.7, "drift": 0.9},
]


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (0.8, {"step": 15, "fidelity": 0.8, "drift": 0.2}),  # half way
        (0.6, {"step": 10, "fidelity": 0.6, "drift": 0.1}),
        (0.1, CURVE[0]),
        (1.1, CURVE[-1]),  # never reached: the end
    ],
)
def test_a_curve_is_read_where_a_metric_first_reaches_a_value(value: float, wanted: dict):
    assert read_at(CURVE, "fidelity", value) == pytest.approx(wanted)


def test_a_study_read_on_curves_starts_at_the_base(workdir: Path):
    at = {"subject_fidelity": [0.8]}
    curve = {"set": [*CONTENT["set"], "online_eval.every_steps=1"]}
    read = ["step", "subject_fidelity", "class_drift"]
    sweep = read_sweep(write(workdir, at=at, metrics=read, **curve))
    measures = [{"step": 10, "subject_fidelity": 1.0, "class_drift": 0.4, "score": 0.5}]
    metrics = {"base": {"subject_fidelity": 0.6, "class_drift": 0.0}, "measures": measures}
    (row,) = rows_of(sweep, jobs_of(sweep)[0], metrics)
    assert (row["step"], row["subject_fidelity"], row["class_drift"]) == (5, 0.8, 0.2)
    low = {**metrics, "measures": [{**measures[0], "subject_fidelity": 0.7}]}
    rows = [row, *rows_of(sweep, jobs_of(sweep)[2], low)]
    page = study.texts_of(sweep, rows, {"Weight 0": 1.0})["weights.md"]
    assert (
        "subject fidelity first reaches 0.8, on straight" in page and "1 rows are of runs that never" in page
    )
    sweep = read_sweep(write(workdir, at={"subject_fidelity": [0.8, 1.0]}, metrics=sweep.metrics, **curve))
    rows = [row for job in jobs_of(sweep)[:1] for row in rows_of(sweep, job, metrics)]
    assert [(r["variant"], r["step"]) for r in rows] == [("Weight 0, at 0.8", 5), ("Weight 0, at 1", 10)]
    page = study.texts_of(sweep, rows, {row["variant"]: 1.0 for row in rows})["weights.md"]
    assert "first reaches 0.8 and 1, on straight" in page and "never reach" not in page


def test_what_only_runs_of_several_have_is_left_out_of_the_others():
    rows = [{**row, "bleeding": None if row["variant"] == "off" else row["class_drift"]} for row in ROWS]
    lines = sweep_page.table(rows, ("bleeding",), {"off": 10, "on <1>": 20}).splitlines()
    assert lines[2] == "| off |  | 10 |" and lines[3] == "| on <1> | 0.250 (a 0.25, b 0.25) | 20 |"
    assert sweep_page.differences(rows, ("bleeding",), {"on <1>": "off"}).endswith("| on <1> - off |  |")
    assert "," in sweep_page.to_csv(rows) and ElementTree.fromstring(sweep_plots.panels(rows, ("bleeding",)))


def test_every_variant_has_a_line_and_a_mark_of_its_own():
    rows = [
        {
            "variant": f"variant <{v}>",
            "subject": f"s{s}",
            "seed": 1,
            "a": (v + s) / 40,
            "b": s / 5 if v else None,
        }
        for v in range(20)
        for s in range(5)
    ]
    tree = ElementTree.fromstring(sweep_plots.panels(rows, ("a", "b")))
    names = [element.text for element in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert [name for name in names if "variant" in name] == [f"variant <{v}>" for v in range(20)]
    circles = [dict(c.attrib) for c in tree.iter("{http://www.w3.org/2000/svg}circle")]
    assert len(circles) == 20 * 6 + 19 * 6, "five runs and their mean, none of what was not measured"
    tree = ElementTree.fromstring(sweep_plots.frontier(rows, "a", "b"))
    marks = [e for e in tree.iter() if e.get("fill") in sweep_plots.COLORS]
    looks = Counter((e.tag, e.get("fill"), "rotate(45" in e.get("transform", "")) for e in marks)
    assert len(looks) == 19 and set(looks.values()) == {2}, "in the plot and in the legend"
