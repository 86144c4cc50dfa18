"""Studies: the grid, its checks before any run, the table against closed forms, and a rerun bit for bit."""

import csv
import io
import json
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import pytest
import yaml
from PIL import Image

from ldm.config import save_config
from ldm.errors import UserError
from ldm.reports import sweep_page, sweep_plots
from ldm.runs import sweep_results as study
from ldm.runs.grid import identity
from ldm.runs.sweep import baselines_of, jobs_of, name_of_lora, names_of_rows, read_sweep
from ldm.storybook.world import CLASSES

ROOT = Path(__file__).resolve().parents[2]
SUBJECTS = ROOT / "configs/studies/subjects.yaml"
SHIPPED = sorted(set((ROOT / "configs/studies").glob("*.yaml")) - {SUBJECTS})

CONTENT = {
    "title": "Weights",
    "claim": "More is more.",
    "base": [str(ROOT / "configs/dreambooth.yaml")],
    "variants": {
        "Weight 0": ["model.params.objective.prior_loss_weight=0"],
        "weight 1": ["model.params.objective.prior_loss_weight=1"],
    },
    "subjects": {"rex": {"class_word": "dog", "seed": 51}, "car": {"class_word": "car", "photos": "cars"}},
    "seeds": [1, 2],
    "set": ["trainer.max_steps=3"],
}


ALSO = "evaluate_also={guidance 4: {guidance_scale: 4.0}}"


def write(folder: Path, **changes: object) -> Path:
    path = folder / "weights.yaml"
    path.write_text(yaml.safe_dump(CONTENT | changes, sort_keys=False))
    return path


def test_the_grid(workdir: Path):
    jobs = jobs_of(read_sweep(write(workdir)))
    assert [(j.variant, j.subject, j.seed) for j in jobs[:3]] == [
        ("Weight 0", "rex", 1),
        ("Weight 0", "rex", 2),
        ("Weight 0", "car", 1),
    ]
    assert len(jobs) == 8 and len({job.folder for job in jobs}) == 8
    first, last = jobs[0].config.container, jobs[-1].config.container
    assert jobs[0].folder == Path("logs/study-weights/weight-0--rex--1")
    weights = [content["model"]["params"]["objective"]["prior_loss_weight"] for content in (first, last)]
    assert weights == [0, 1] and first["trainer"]["max_steps"] == 3 and last["seed"] == 2
    assert (last["data"]["params"]["class_word"], last["data"]["params"]["subject_root"]) == ("car", "cars")
    assert len(list(Path(first["data"]["params"]["subject_root"]).glob("*.png"))) == 5


BOTH = {**CONTENT["subjects"], "both": {"together": ["rex", "car"]}}


def test_several_subjects_are_one_run_together(workdir: Path):
    jobs = jobs_of(read_sweep(write(workdir, subjects=BOTH)))
    alone, both = jobs[0].config.container["data"]["params"], jobs[4].config.container["data"]["params"]
    assert (jobs[4].subject, both["subject_root"], both["class_word"], both["identifier"]) == (
        "both",
        *3 * [None],
    )
    assert both["concepts"] == [
        {"root": alone["subject_root"], "identifier": "sks", "class_word": "dog", "name": "rex"},
        {"root": "cars", "identifier": "zwx", "class_word": "car", "name": "car"},
    ]
    other = write(workdir, subjects=BOTH).rename(workdir / "other.yaml")
    again = jobs_of(read_sweep(other))[4]
    assert again.config.container != jobs[4].config.container
    assert identity(again.config.container) == identity(jobs[4].config.container)


@pytest.mark.parametrize(
    "subject, message",
    [
        ({"together": ["rex"]}, "`all` is not several"),
        ({"together": ["rex", "rex"]}, "`all` is not several"),
        ({"together": ["rex", "car"], "class_word": "dog"}, "`all` is not several"),
        ({"together": ["rex", "max"]}, "`max` of `all` is not a single subject.*Choose of rex, car"),
        ({"together": ["rex", "both"]}, "`both` of `all` is not a single subject"),
    ],
)
def test_what_is_not_several_subjects_is_refused(workdir: Path, subject: dict, message: str):
    with pytest.raises(UserError, match=message):
        read_sweep(write(workdir, subjects={**BOTH, "all": subject}))


def test_runs_that_studies_have_in_common_are_known(workdir: Path):
    jobs = jobs_of(read_sweep(write(workdir)))
    again = CONTENT | {"variants": {"alone": ["model.params.objective.prior_loss_weight=1.0"]}}
    (workdir / "other.yaml").write_text(yaml.safe_dump(again, sort_keys=False))
    others = jobs_of(read_sweep(workdir / "other.yaml"))
    contents = {job.folder.name: identity(job.config.container) for job in [*jobs, *others]}
    same = {(a.folder.name, b.folder.name) for a in jobs for b in others}
    same = {(a, b) for a, b in same if contents[a] == contents[b]}
    runs = ("rex--1", "rex--2", "car--1", "car--2")
    assert same == {(f"weight-1--{run}", f"alone--{run}") for run in runs}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {}}, "`variants` is missing"),
        ({"colour": 1}, "`colour` is not a key"),
        ({"seeds": 5}, r"5 \(int\) should be Sequence"),
        ({"metrics": ["subject_fidelity", "colour"]}, "has no metric `colour`.*class_drift"),
        ({"frontier": ["class_drift", "beauty"]}, "frontier is not of .*beauty.*study's `metrics`"),
        ({"frontier": ["class_drift", "class_shift_frechet"]}, "frontier is not of .*study's `metrics`"),
        ({"frontier": ["class_drift"]}, "frontier is not of .*Name two"),
        ({"set": ["evaluation=null", "online_eval.every_steps=0"]}, "has no metric `subject_fidelity`"),
        ({"variants": {"a": ["model.params.no_such=1"]}}, "The variant `a` is not a config.*no_such"),
        ({"variants": {"a b": [], "a-b": []}}, "would share a folder"),
        ({"subjects": {"rex": {"class_word": "dog"}}}, "`rex` is not complete"),
        ({"subjects": {"rex": {"class_word": "whale", "seed": 1}}}, "has no `whale`"),
        (
            {"only": {"Weight 0": ["rex"]}},
            "`weight 1` is compared with `Weight 0`, which has no runs of car.*the same subjects",
        ),
        (
            {"variants": {"off": [], "on": [ALSO]}},
            "`on, guidance 4` is compared with `off, guidance 4`, which has no runs of rex, car",
        ),
    ],
)
def test_mistakes_are_found_before_the_first_run(workdir: Path, changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        jobs_of(read_sweep(write(workdir, **changes)))


def test_a_baseline_may_have_more_than_the_others(workdir: Path):
    """Subjects and samplings: what it has more of is compared with nothing."""
    variants = {"on": [ALSO], "off": []}
    jobs = jobs_of(read_sweep(write(workdir, variants=variants, only={"off": ["car"]})))
    assert [(job.variant, job.subject) for job in jobs[::2]] == [("on", "rex"), ("on", "car"), ("off", "car")]


def test_studies_share_groups_of_subjects(workdir: Path):
    (workdir / "subjects.yaml").write_text(yaml.safe_dump({"some": CONTENT["subjects"], "odd": ["rex"]}))
    alone, shared = read_sweep(write(workdir)), read_sweep(write(workdir, subjects="subjects.yaml:some"))
    assert shared == alone
    for named, message in {
        "subjects.yaml": "`subjects.yaml` names no group.*FILE:GROUP",
        "subjects.yaml:all": "no group `all`.*It has odd, some",
        "none.yaml:some": "The file of subjects cannot be read",
        "subjects.yaml:odd": "should be Mapping",
    }.items():
        with pytest.raises(UserError, match=message):
            read_sweep(write(workdir, subjects=named))


def test_no_subject_that_is_measured_at_the_end_was_chosen_on():
    groups = yaml.safe_load(SUBJECTS.read_text(encoding="utf-8"))
    assert list(groups) == ["development", "studies", "held_out_a", "held_out_b"]
    seeds = {name: {s["seed"] for s in group.values() if "seed" in s} for name, group in groups.items()}
    for held_out in ("held_out_a", "held_out_b"):
        assert len(seeds[held_out]) == len(groups[held_out]) == 12
        assert Counter(s["class_word"] for s in groups[held_out].values()) == dict.fromkeys(CLASSES, 2)
        assert not seeds[held_out] & set().union(*(seeds[name] for name in groups if name != held_out))
    assert len(groups["studies"].keys() - groups["development"]) >= 2


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_studies_are_sound(path: Path, monkeypatch: pytest.MonkeyPatch, workdir: Path):
    sweep = read_sweep(path)
    (workdir / "configs").symlink_to(ROOT / "configs")
    jobs = jobs_of(sweep)
    assert len(sweep.subjects) >= 4 and len(sweep.subjects) * len(sweep.seeds) >= 6
    assert sweep.finding.strip() and sweep.made_at.strip(), "a study is shipped with what it found, and where"
    rows = list(csv.DictReader((ROOT / f"studies/{sweep.name}.csv").open()))
    assert len(rows) >= 12
    found: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        found.setdefault(row["variant"], []).append((row["subject"], row["seed"]))
    wanted: dict[str, list[tuple[str, str]]] = {}
    for job in jobs:
        several = job.subject in sweep.groups
        name = f"{job.variant}, {job.subject}" if several else job.variant
        values = [value for values in sweep.at.values() for value in values]
        read = [f"{name}, at {value:g}" for value in values] if len(values) > 1 else [name]
        read += [name_of_lora(job.variant, rank) for rank in sweep.extracted.get(job.variant, ())]
        for row in (*read, *(f"{name}, {also}" for also in job.config.evaluate_also or ())):
            for subject in sweep.subjects[job.subject]["together"] if several else [job.subject]:
                wanted.setdefault(row, []).append((subject, str(job.seed)))
    assert found == wanted


def test_a_finished_study_is_published_with_a_row_for_each_sampling(workdir: Path):
    sweep = read_sweep(write(workdir, set=[*CONTENT["set"], ALSO]))
    jobs = jobs_of(sweep)
    for k, job in enumerate(jobs):
        values = {name: k / 10 for name in sweep.metrics}
        doubled = {name: 2 * value for name, value in values.items()}
        seconds = {"training": 10.0 * (job.variant == "weight 1") + k % 4}
        job.folder.mkdir(parents=True)
        metrics = {**values, "evaluate_also": {"guidance 4": doubled}, "seconds": seconds}
        (job.folder / "metrics.json").write_text(json.dumps(metrics))
        save_config(job.config.source, job.folder / "config.yaml")
    paths = study.publish(sweep, jobs, workdir / "studies")
    rows = list(csv.DictReader(paths[0].open()))
    names = ["Weight 0", "Weight 0, guidance 4", "weight 1", "weight 1, guidance 4"]
    assert [row["variant"] for row in rows] == [name for name in names for _ in range(4)]
    assert [float(row["class_drift"]) for row in rows[:8]] == [0, 0.1, 0.2, 0.3, 0, 0.2, 0.4, 0.6]
    page = (workdir / "studies/weights.md").read_text()
    assert "| Weight 0, guidance 4 | 0.300 " in page and page.count("| 2 |") == 2 and "| 12 |" in page


ROWS = [
    {
        "variant": variant,
        "subject": subject,
        "seed": seed,
        "subject_fidelity": value,
        "class_drift": value / 2,
    }
    for variant, values in {"off": (0.2, 0.4, 0.6, 0.8), "on <1>": (0.5,) * 4}.items()
    for (subject, seed), value in zip((("a", 1), ("a", 2), ("b", 1), ("b", 2)), values, strict=True)
]


def test_csv():
    back = list(csv.DictReader(io.StringIO(sweep_page.to_csv(ROWS))))
    assert [float(row["subject_fidelity"]) for row in back] == [row["subject_fidelity"] for row in ROWS]


def test_the_page_holds_every_variant():
    metrics = ("subject_fidelity", "class_drift")
    lines = sweep_page.table(ROWS, metrics, {"off": 10, "on <1>": 20}).splitlines()
    assert (
        lines[2] == "| off | 0.500 (a 0.30, b 0.70) | 0.250 (a 0.15, b 0.35) | 10 |"
        and lines[3] == "| on <1> | 0.500 (a 0.50, b 0.50) | 0.250 (a 0.25, b 0.25) | 20 |"
    )


def test_differences_are_bold_beyond_their_interval():
    many = [
        {
            "variant": variant,
            "subject": f"s{k}",
            "seed": 1,
            "clear": k + shift,
            "unclear": k + shift * (-1) ** k,
        }
        for variant, shift in (("off", 0.0), ("on", 0.5))
        for k in range(6)
    ]
    line = sweep_page.differences(many, ("clear", "unclear"), {"on": "off"}).splitlines()[-1]
    assert line.startswith("| on - off | **+0.500 (+0.50 to +0.50)** | +0.000 (-0.")
    few = sweep_page.differences(ROWS, ("class_drift",), {"on <1>": "off"}).splitlines()[-1]
    assert few == "| on <1> - off | +0.000 (a +0.10, b -0.10) |"


def test_each_sampling_is_compared_with_the_baselines_own(workdir: Path):
    variants = {"off": ["model.params.objective.prior_loss_weight=0"], "off, long": ["trainer.max_steps=9"]}
    rows = ["off", "off, guidance 4", "off, long", "off, long, guidance 4"]
    sweep = read_sweep(write(workdir, variants=variants))
    assert baselines_of(sweep, rows) == {"off, long": "off", "off, long, guidance 4": "off, guidance 4"}
    sweep = read_sweep(write(workdir, variants=variants, baseline="off, long"))
    assert baselines_of(sweep, rows) == {"off": "off, long", "off, guidance 4": "off, long, guidance 4"}
    with pytest.raises(UserError, match="`on` of `baseline` is not a variant"):
        read_sweep(write(workdir, variants=variants, baseline="on"))


def test_samplings_of_a_variant_are_compared_with_one_of_them(workdir: Path):
    also = ["evaluate_also={fine: {steps: 50}, coarse: {steps: 2}}"]
    given = {"set": also, "variants": {"on": []}}
    sweep = read_sweep(write(workdir, baseline_sampling="fine", **given))
    expected = {"on": "on, fine", "on, coarse": "on, fine"}
    assert baselines_of(sweep, names_of_rows(sweep, jobs_of(sweep)[0])) == expected
    with pytest.raises(UserError, match="`on` is compared with `on, finest`, which has no runs of"):
        jobs_of(read_sweep(write(workdir, baseline_sampling="finest", **given)))
    with pytest.raises(UserError, match="Take one of them off"):
        read_sweep(write(workdir, baseline_sampling="fine", baseline="on", **given))


def test_images_stand_side_by_side(workdir: Path):
    prompt = "a photo of a {class_word}"
    words = ["trainer.max_steps=3", f"samples.prompts=['a photo','{prompt}']"]
    sweep = read_sweep(write(workdir, set=words, pictures=prompt))
    jobs = jobs_of(sweep)
    for k, job in enumerate(jobs):
        for place, level in (("samples/before", 255), ("samples", 20 * k)):
            (job.folder / place).mkdir(parents=True, exist_ok=True)
            for row in (0, 1):
                Image.new("L", (64, 64), level * row).save(job.folder / place / f"{row:02d}-00.png")
    (path,) = study.save_pictures(sweep, jobs, workdir)
    sheet = Image.open(path).convert("L")
    height = sheet.height // 6  # base and two variants of two subjects
    shown = [sheet.getpixel((30, height * k + height // 2 + 10)) for k in range(6)]
    by_subject = {
        s: [20 * k for k, j in enumerate(jobs) if (j.subject, j.seed) == (s, 1)] for s in sweep.subjects
    }
    assert shown == [level for levels in by_subject.values() for level in (255, *levels)]


def test_of_several_subjects_in_one_run_each_has_its_own_row(workdir: Path):
    """Rows of samples: dog and car of the first template, then of the second, which is the one shown."""
    prompt = "a photo of a {class_word}"
    words = ["trainer.max_steps=3", f"samples.prompts=['{{identifier}} {{class_word}}','{prompt}','a tree']"]
    sweep = read_sweep(write(workdir, set=words, subjects=BOTH, seeds=[1], pictures=prompt))
    jobs = jobs_of(sweep)
    for k, job in enumerate(jobs):
        for place, level in (("samples/before", 100), ("samples", 140 + 10 * k)):
            (job.folder / place).mkdir(parents=True, exist_ok=True)
            for row in range(5 if job.subject == "both" else 3):
                Image.new("L", (64, 64), level + row).save(job.folder / place / f"{row:02d}-00.png")
    (path,) = study.save_pictures(sweep, jobs, workdir)
    sheet = Image.open(path).convert("L")
    height = sheet.height // 12  # single subjects: base and two variants; both: twice as many
    shown = [sheet.getpixel((30, height * k + height // 2 + 10)) for k in range(12)]
    order = {(job.variant, job.subject): k for k, job in enumerate(jobs)}
    wanted = []
    for subject, rows in (("rex", [1]), ("car", [1]), ("both", [2, 3])):
        levels = [100, *(140 + 10 * order[variant, subject] for variant in sweep.variants)]
        wanted += [level + row for level in levels for row in rows]
    assert sorted(shown) == sorted(wanted) and shown[:6] == wanted[:6]


def test_a_picture_that_is_not_sampled_is_found_before_the_first_run(workdir: Path):
    with pytest.raises(UserError, match="`a house` is not sampled by `Weight 0`.*pictures"):
        jobs_of(read_sweep(write(workdir, pictures="a house")))


@pytest.mark.parametrize(
    "plot",
    [
        sweep_plots.panels(ROWS, ("subject_fidelity", "class_drift")),
        sweep_plots.frontier(ROWS, "class_drift", "subject_fidelity"),
    ],
)
def test_plots_are_well_formed_and_inside_their_frame(plot: str):
    root = ElementTree.fromstring(plot)
    *_, width, height = map(float, root.attrib["viewBox"].split())
    circles = [e for e in root.iter() if e.tag.endswith("circle")]
    assert len(circles) >= 2
    for circle in circles:
        assert 0 <= float(circle.attrib["cx"]) <= width and 0 <= float(circle.attrib["cy"]) <= height


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_pages_are_made_of_their_csv(path: Path):
    """The seconds of trainings are the only numbers of a page that its CSV has not."""
    sweep, page = read_sweep(path), (ROOT / f"studies/{path.stem}.md").read_text(encoding="utf-8")
    table = page.split("| variant |")[1].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")] for line in table]
    seconds = {cell[1]: float(cell[-2]) for cell in cells}
    rows = [
        {
            name: value if name in ("variant", "subject") else json.loads(value or "null")
            for name, value in row.items()
        }
        for row in csv.DictReader((ROOT / f"studies/{path.stem}.csv").open())
    ]
    sheets = [f"{path.stem}-samples.png"] if sweep.pictures else []
    assert all((ROOT / "studies" / name).exists() for name in sheets)
    for name, text in study.texts_of(sweep, rows, seconds, pictures=sheets).items():
        assert (ROOT / "studies" / name).read_text(encoding="utf-8") == text
