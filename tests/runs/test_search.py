"""Searches: what is refused before any work, trials killed anywhere, pruning, the front, the page."""

import json
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from ldm import targets
from ldm.commands import search as command_of_search
from ldm.engine.non_finite import NonFiniteError
from ldm.errors import UserError
from ldm.reports.search_page import Result, to_csv, trial_name
from ldm.runs import grid, trials
from ldm.runs import search as searches
from ldm.runs import search_results as script_of_search
from ldm.runs.grid_subjects import slug
from ldm.runs.search import Range, Search, check_search, overrides_of
from ldm.runs.trials import Trials, Worker, is_better, mend_journal, running_mean
from ldm.schema import RunConfig
from tests.short_runs import Killed, ScriptedRuns

ROOT = Path(__file__).resolve().parents[2]
LEAN = """
name: lean
seed: 1
model:
  target: ldm.training.latent_diffusion.LatentDiffusion
  params:
    trainable: {learning_rate: 1.5e-4}
    objective: {prior_loss_weight: 2.5}
    unet: {target: ldm.models.unet.UNetModel, params: {model_channels: 48}}
    vae: {target: ldm.models.autoencoder.AutoencoderKL}
    text_encoder: {target: ldm.models.text_encoder.CLIPTextEncoder}
data: {target: ldm.data.dreambooth.DreamBoothDataModule, params: {size: 64}}
trainer: {max_steps: 280}
evaluation: {target: ldm.evaluation.storybook.StorybookEvaluation}
"""  # a config that is soon parsed, of runs that are scripted
BASE = ROOT / "configs/dreambooth.yaml"
RATE = "model.params.trainable.learning_rate"
WEIGHT = "model.params.objective.prior_loss_weight"
CONTENT = {
    "title": "Rates",
    "trials": 8,
    "keys": {RATE: {"log": [1.0e-5, 1.0e-3]}, WEIGHT: {"float": [0.5, 4.0]}},
    "subjects": {"rex": {"class_word": "dog", "seed": 51}, "tom": {"class_word": "cat", "seed": 52}},
    "seeds": [1],
    "set": ["samples.prompts=['a photo of a {class_word}']"],
    "metrics": ["subject_fidelity"],
    "prune_after": 0,
}


def read(folder: Path, config: Path | str = "lean.yaml", **changes: Any) -> Search:
    if not (folder / "lean.yaml").exists():  # others of several processes read it
        (folder / "lean.yaml").write_text(LEAN)
    path = folder / "rates.yaml"
    path.write_text(yaml.safe_dump(CONTENT | changes, sort_keys=False))
    return Search.read(path, base=[str(config)])


def fidelity(config: RunConfig, share: float) -> dict[str, float]:
    """Best at a rate of 1e-4 and a weight of 2, and growing with the steps; a little more for cats."""
    params = config.model["params"]
    rate, weight = params["trainable"]["learning_rate"], params["objective"]["prior_loss_weight"]
    far = abs(math.log10(rate) + 4) + 0.1 * abs(weight - 2)
    value = share * math.exp(-far) + 0.1 * (config.data["params"]["class_word"] == "cat")
    lost = 0.1 * rate / 1e-4
    return {"subject_fidelity": value, "prompt_fidelity": 0.9, "class_drift": lost, "class_shift": lost}


@pytest.fixture
def optuna(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Optuna, and no check of each trial's config, which takes longer than all else here."""
    monkeypatch.setattr(trials, "validate", lambda config, **more: None)
    return pytest.importorskip("optuna")


def outcome(store: Trials) -> list[tuple]:
    """Of every trial, all but the time that it took."""
    return [(r.number, r.state, r.settings, r.rows, r.why) for r in store.results()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": {}}, "`keys` is missing or empty"),
        ({"keys": {RATE: {"log": [1e-3, 1e-5]}}}, rf"The range \[0.001, 1e-05\] is empty \(.*{RATE}\)"),
        ({"keys": {RATE: {"log": [1e-4, 1e-4]}}}, "is empty"),
        ({"keys": {RATE: {"log": [0, 1]}}}, "no range of logarithms"),
        ({"keys": {RATE: {"float": [0.1, "high"]}}}, "'high' is not a number"),
        ({"keys": {RATE: {"float": [0.1, math.inf]}}}, "inf is no number"),
        ({"keys": {RATE: {"float": [True, 2]}}}, "True is not a number"),
        ({"keys": {RATE: {"float": [0.1]}}}, "is empty"),
        ({"keys": {RATE: {"float": 0.1}}}, "0.1 is not a list"),
        ({"keys": {RATE: {"uniform": [0.1, 1]}}}, "is not a range.*float, log or int"),
        ({"keys": {RATE: {"log": [0.1, 1], "float": [0.1, 1]}}}, "is not a range"),
        ({"keys": {RATE: [0.1, 1]}}, "should be Mapping"),
        ({"keys": {"trainer.max_steps": {"int": [1.5, 9]}}}, "1.5 is not a whole number"),
        ({"keys": {"trainer.max_steps": {"int": [10, 25], "step": 10}}}, "Steps of 10 do not lead"),
        ({"keys": {"ema_decay": {"choice": []}}}, "is empty"),
        ({"keys": {"ema_decay": {"choice": [0.9]}}}, "is empty"),
        ({"keys": {"ema_decay": {"choice": [0.9, 0.9]}}}, "is empty"),
        ({"keys": {"ema_decay": {"choice": [[0.9], [0.8]]}}}, "cannot be a choice"),
        ({"keys": {"seed": {"int": [1, 9]}}}, "`seed` cannot be searched"),
        ({"set": [f"{RATE}=1e-4"]}, f"`{RATE}` cannot be searched: `set` sets it"),
        ({"trials": 0}, "`trials` is missing or empty"),
        ({"trials": -3}, "-3 .*should be int .at least 1"),
        ({"metrics": ["subject_fidelity", "class_drift", "class_shift"]}, "no metrics"),
        ({"metrics": ["class_drift", "class_drift"]}, "no metrics"),
        ({"colour": 1}, "`colour` is not a key of a search"),
        ({"base": ["x.yaml"]}, "`base` is not a key of a search"),
        ({"subjects": {"rex": {"class_word": "whale", "seed": 1}}}, "has no `whale`"),
    ],
)
def test_what_is_wrong_by_itself_is_refused(workdir: Path, changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        read(workdir, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": {"model.params.learnin_rate": {"log": [1e-5, 1e-3]}}}, "`learnin_rate` is not a parameter"),
        ({"keys": {"colour": {"choice": ["red", "blue"]}}}, "`colour` is not a section"),
        ({"keys": {"ema_decay": {"float": [0.5, 1.0]}}}, "`ema_decay` cannot be 1.0.*less than 1"),
        ({"keys": {WEIGHT: {"float": [-1, 4]}}}, f"`{WEIGHT}` cannot be -1.0.*Narrow its range"),
        ({"keys": {"samples.sampler": {"choice": ["ddim", "fast"]}}}, "cannot be 'fast'"),
        ({"keys": {"trainer.max_steps": {"float": [70, 140]}}}, "should be int"),
        ({"keys": {"samples.steps": {"int": [10, 2000]}}}, "cannot be 2000.*more than the schedule"),
        ({"metrics": ["beauty"]}, "StorybookEvaluation has no metric `beauty`.*score.*class_drift"),
        ({"set": ["evaluation=null", "online_eval.every_steps=0"]}, "A search needs an `evaluation`"),
        ({"pictures": "a house"}, "`a house` is not sampled"),
    ],
)
def test_the_ends_of_the_ranges_are_tried_on_the_config(workdir: Path, changes: dict, message: str):
    one = {"subjects": {"rex": CONTENT["subjects"]["rex"]}}
    with pytest.raises(UserError, match=message):
        check_search(read(workdir, BASE, **one | changes))
    assert not list(workdir.glob("logs/search-rates/*--*"))


def test_a_sound_search_passes_and_yaml_numbers_without_a_point_are_numbers(workdir: Path):
    own = {"keys": {RATE: {"log": ["1e-5", "1e-3"]}}, "metrics": ["score", "class_drift"]}
    search = read(workdir, BASE, **own | {"subjects": {"rex": CONTENT["subjects"]["rex"]}})
    check_search(search)
    assert search.signs() == [1, -1] and search.base_values() == {RATE: 3.0e-4}
    own["keys"] = {RATE: {"log": [1e-3, 1e-2]}}
    assert read(workdir, BASE, **CONTENT | own).base_values() is None


@pytest.mark.parametrize("path", sorted((ROOT / "configs/searches").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_searches_are_sound(path: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(searches, "validate", lambda config: None)  # names, types and bounds are checked
    (workdir / "ldm").symlink_to(ROOT / "ldm")
    search = Search.read(path, base=[str(BASE)])
    check_search(search)
    assert search.base_values() is not None, "the first trial is the shipped config"


FLOATS = st.floats(-1e6, 1e6, allow_nan=False)


@given(st.tuples(FLOATS, FLOATS).filter(lambda ends: ends[0] < ends[1]), st.floats(0, 1))
def test_rounded_numbers_stay_inside(ends: tuple[float, float], share: float):
    own = Range.parse({"float": list(ends)})
    value = min(ends[0] + share * (ends[1] - ends[0]), ends[1])
    rounded = own.rounded(value)
    assert own.holds(rounded) and abs(rounded - value) <= 5.1e-4 * abs(value) + 1e-300
    assert all(own.rounded(end) == pytest.approx(end, rel=5.1e-4) for end in own.ends)


def test_what_a_range_holds():
    steps = Range.parse({"int": [70, 280], "step": 70})
    assert [value for value in (0, 70, 100, 140, 280, 350, 140.0, True) if steps.holds(value)] == [
        70,
        140,
        280,
    ]
    choice = Range.parse({"choice": [1, None, "1"]})
    assert choice.holds(None) and choice.holds("1") and not choice.holds(True) and not choice.holds(1.0)


def test_settings_reach_the_config_as_they_are(workdir: Path):
    values = {"data.params.identifier": "null", "ema_decay": None, RATE: 1e-05, "trainer.max_steps": 70}
    config = read(workdir).first_job("trial 0000", overrides_of(values)).config
    assert config.data["params"]["identifier"] == "null" and config.ema_decay is None
    assert (config.model["params"]["trainable"]["learning_rate"], config.trainer.max_steps) == (1e-05, 70)


def test_without_optuna_one_sentence_names_the_remedy(workdir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"needs Optuna.*pip install .*\[search\]"):
        Trials(read(workdir), workdir / "trials.db")


@pytest.mark.parametrize(("suffix", "count"), [(".db", 2), (".journal", 8)])
def test_a_search_finds_the_best_settings(
    workdir: Path, script: Callable, optuna: Any, suffix: str, count: int
):
    script(fidelity)
    search = read(workdir, trials=count)
    store = Trials(search, workdir / f"trials{suffix}")
    Worker(store)()
    results = store.results()
    assert [r.number for r in results] == list(range(count)) and {r.state for r in results} == {"finished"}
    assert results[0].settings == search.base_values()
    expected = [(r.mean("subject_fidelity"), r.number) for r in results]
    assert store.best() == [max(expected)[1]]
    assert count < 8 or max(expected)[0] > expected[0][0]  # better than the base
    again = Trials(search, workdir / f"trials{suffix}")
    Worker(again)()  # nothing is left to do
    assert outcome(again) == outcome(store)
    Worker(Trials(read(workdir, trials=count + 1), workdir / f"trials{suffix}"))()  # more of them
    assert outcome(again)[:count] == outcome(store)[:count] and len(again.results()) == count + 1


def test_killed_anywhere_it_is_the_same_search(workdir: Path, script: Callable, optuna: Any):
    changes = {"trials": 5, "prune_after": 2, "metrics": ["score"]}
    runs = script(lambda config, share: (f := fidelity(config, share)) | {"score": f["subject_fidelity"]})
    whole = Trials(read(workdir, **changes), workdir / "whole.journal")
    Worker(whole)()
    once, wanted = list(runs.steps), outcome(whole)
    assert {r.state for r in whole.results()} == {"finished", "pruned"}
    (workdir / "logs").rename(workdir / "logs-whole")
    kills = iter(range(1, len(once), 5))
    runs = script(runs.metrics)
    at = next(kills)

    def step(name: str, number: int) -> None:
        nonlocal at
        if len(runs.steps) >= at:
            at = next(kills, 10**9)
            raise Killed

    runs.before_step = step
    while True:
        try:
            Worker(Trials(read(workdir, **changes), workdir / "killed.journal"))()
            break
        except Killed:
            continue
    assert runs.steps == once  # in the same order, none twice
    assert outcome(Trials(read(workdir, **changes), workdir / "killed.journal")) == wanted


def test_a_killed_trial_is_finished_after_their_number_was_lowered(
    workdir: Path, script: Callable, optuna: Any
):
    """To as many as had ended, so that none is left to begin."""
    runs = script(fidelity)

    def step(name: str, number: int) -> None:
        if "0002" in name:
            raise Killed

    runs.before_step = step
    with pytest.raises(Killed):
        Worker(Trials(read(workdir, trials=5), workdir / "trials.journal"))()
    runs.before_step = lambda name, number: None
    store = Trials(read(workdir, trials=2), workdir / "trials.journal")
    Worker(store)()
    assert [result.state for result in store.results()] == ["finished"] * 3


def test_processes_share_one_storage_and_a_killed_one_loses_nothing(
    workdir: Path, script: Callable, optuna: Any
):
    def step(name: str, number: int) -> None:
        time.sleep(0.02)
        if "0002--tom" in name and number == 3 and not Path("killed").exists():
            Path("killed").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        with open("steps.txt", "a") as file:
            file.write(f"{os.getpid()} {name} {number}\n")

    script(fidelity, step)

    def act() -> None:
        Worker(Trials(read(workdir), workdir / "trials.journal"))()

    read(workdir)
    processes = [multiprocessing.get_context("fork").Process(target=act) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(process.exitcode for process in processes) == [-signal.SIGKILL, 0, 0]
    act()  # what the killed one left, unless the others have
    results = Trials(read(workdir), workdir / "trials.journal").results()
    assert [r.number for r in results] == list(range(8)) and {r.state for r in results} == {"finished"}
    lines = [line.split() for line in Path("steps.txt").read_text().splitlines()]
    assert len(lines) == len({tuple(line[1:]) for line in lines}) == 8 * 2 * 4
    assert len({line[0] for line in lines}) >= 2


def test_a_bad_trial_ends_early(workdir: Path, script: Callable, optuna: Any):
    """Worse from its first step on than three finished ones: it makes that step, and no more."""
    runs = script(lambda config, share: fidelity(config, share) | {"score": 0.0})
    runs.metrics = lambda config, share: {"subject_fidelity": share - 0.5 * ("0003" in config.name)}
    store = Trials(read(workdir, trials=5, prune_after=3), workdir / "trials.journal")
    Worker(store)()
    states = [result.state for result in store.results()]
    assert states == ["finished", "finished", "finished", "pruned", "finished"]
    assert [name for name, _ in runs.steps if "0003" in name] == ["search-rates/trial-0003--rex--1"]
    assert "most trials were better" in store.results()[3].why
    assert not list(workdir.glob("logs/search-rates/*/checkpoints"))


def test_points_are_compared_over_all_runs_so_far():
    curve = {"0/2": [0.1], "0/end": [0.4], "1/2": [0.2], "1/end": [0.6]}
    assert running_mean(curve, "1/2") == pytest.approx([0.3]) and running_mean(curve, "1/end") == [0.5]
    assert is_better([0.5, 0.1], [0.4, 0.2], [1, -1]) and not is_better([0.5, 0.3], [0.4, 0.2], [1, -1])
    assert not is_better([0.4, 0.1], [0.4, 0.2], [1, -1])


def test_the_front_is_that_of_all_pairs(workdir: Path, script: Callable, optuna: Any):
    script(fidelity)
    metrics = ["subject_fidelity", "class_drift"]
    store = Trials(read(workdir, trials=12, metrics=metrics), workdir / "trials.journal")
    Worker(store)()
    found = {r.number: [r.mean(name) for name in metrics] for r in store.results()}
    dominated = {
        a
        for a, b in product(found, found)
        if found[b] != found[a] and found[b][0] >= found[a][0] and found[b][1] <= found[a][1]
    }
    assert store.best() == sorted(found.keys() - dominated) and 1 < len(store.best()) < 12
    shares = store.importances()
    assert list(shares) == metrics and all(sum(s.values()) == pytest.approx(1) for s in shares.values())
    assert next(iter(shares["class_drift"])) == RATE  # the only key that it depends on


def test_settings_that_fail_end_their_trial_alone(
    workdir: Path, script: Callable, optuna: Any, monkeypatch: pytest.MonkeyPatch
):
    def check(config: RunConfig, **more: object) -> None:
        if "trial-0002" in config.name:
            raise UserError("They do not go together")

    def step(name: str, number: int) -> None:
        if "trial-0001" in name and number == 2:
            raise NonFiniteError("The loss of step 2 is not finite")

    monkeypatch.setattr(trials, "validate", check)
    script(fidelity, step)
    store = Trials(read(workdir, trials=4), workdir / "trials.journal")
    Worker(store)()
    assert [r.state for r in store.results()] == ["finished", "pruned", "pruned", "finished"]
    assert "is not finite" in store.results()[1].why and "do not go together" in store.results()[2].why

    def full(config: RunConfig, **more: object) -> None:
        raise UserError("The disk is full")

    monkeypatch.setattr(trials, "validate", full)  # the base's too: it is not the settings
    with pytest.raises(UserError, match="The disk is full"):
        Worker(Trials(read(workdir, trials=5), workdir / "trials.journal"))()
    monkeypatch.setattr(trials, "validate", lambda config, **more: None)
    Worker(Trials(read(workdir, trials=5), workdir / "trials.journal"))()
    assert store.results()[4].state == "finished"


def test_a_subject_without_metrics_is_told(workdir: Path, script: Callable, optuna: Any):
    for metric in ("subject_fidelity", "score"):
        script(lambda config, share: {}, length=0)
        store = Trials(read(workdir, metrics=[metric]), workdir / f"{metric}.journal")
        with pytest.raises(UserError, match=f"The run has no `{metric}`"):
            Worker(store)()


def test_a_storage_is_of_one_search(workdir: Path, optuna: Any):
    path = workdir / "trials.journal"
    Trials(read(workdir), path)
    Trials(read(workdir, trials=99, title="Rates again", prune_after=1), path)
    for changes in ({"seeds": [2]}, {"keys": {RATE: {"log": [1e-5, 1e-2]}}}, {"metrics": ["class_drift"]}):
        with pytest.raises(UserError, match="The search has changed since it began: .* -> "):
            Trials(read(workdir, **changes), path)
    with pytest.raises(UserError, match="not kept in such a file"):
        Trials(read(workdir), workdir / "trials.txt")
    for suffix in (".db", ".journal"):
        (workdir / f"broken{suffix}").write_text("no storage\n" * 99)
        with pytest.raises(UserError, match="cannot be read"):
            Trials(read(workdir), workdir / f"broken{suffix}")


def test_a_line_that_was_written_in_part_is_cut_off(workdir: Path, script: Callable, optuna: Any):
    script(fidelity)
    path = workdir / "trials.journal"
    Worker(Trials(read(workdir, trials=2), path))()
    whole = path.read_bytes()
    for part in (1, 10, len(whole.splitlines(keepends=True)[-1]) - 1):
        path.write_bytes(whole + whole.splitlines(keepends=True)[-1][:part])
        mend_journal(path, optuna.storages.journal.JournalFileSymlinkLock(str(path)))
        assert path.read_bytes() == whole
    path.write_bytes(whole[:-3])
    assert len(Trials(read(workdir, trials=2), path).results()) == 2


def finished_search(workdir: Path, script: Callable, argv: list[str]) -> None:
    runs = script(fidelity)

    def picture(name: str, step: int) -> None:
        folder = Path("logs", name, "samples")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), "red").save(folder / "00-00.png")

    runs.before_step = picture
    script_of_search.run_search(command_of_search.parse(argv), argv)


@pytest.mark.parametrize("pictures, alone, several", [("", [0], [0, 1]), ("a {class_word}", [1], [2, 3])])
def test_the_sheet_of_a_trial_shows_one_prompt_of_each_subject(
    workdir: Path, pictures: str, alone: list[int], several: list[int]
):
    subjects = {**CONTENT["subjects"], "both": {"together": ["rex", "tom"]}}
    prompts = ["samples.prompts=['{identifier} {class_word}','a {class_word}','a tree']"]
    search = read(workdir, subjects=subjects, set=prompts, pictures=pictures)
    for s, subject in enumerate(subjects):
        samples = search.folder / f"{slug(trial_name(0))}--{subject}--1/samples"
        samples.mkdir(parents=True)
        for row in range(5 if subject == "both" else 3):
            Image.new("L", (64, 64), 100 + 20 * s + row).save(samples / f"{row:02d}-00.png")
    result = Result(0, "finished", {}, [])
    sheet = script_of_search.sheet_of(search, result).convert("L")
    rows = [100 + row for row in alone] + [120 + row for row in alone] + [140 + row for row in several]
    height = sheet.height // len(rows)
    assert [sheet.getpixel((30, height * k + height // 2 + 10)) for k in range(len(rows))] == rows
    for path in samples.iterdir():
        path.unlink()
    assert round(script_of_search.sheet_of(search, result).height / height) == 2
    Image.new("L", (64, 64), 200).save(samples / "step-00000002.png")  # of a run that ended early
    sheet = script_of_search.sheet_of(search, result).convert("L")
    assert round(sheet.height / height) == 3 and sheet.getpixel((30, 2 * height + height // 2 + 10)) == 200


@pytest.mark.parametrize("metrics", [["subject_fidelity"], ["subject_fidelity", "class_drift"]])
def test_the_command_leaves_a_page_and_configs_to_run(
    workdir: Path, script: Callable, optuna: Any, monkeypatch: pytest.MonkeyPatch, metrics: list[str]
):
    monkeypatch.setattr(script_of_search, "check_search", lambda search: None)
    read(workdir, trials=3, metrics=metrics)
    argv = ["--base", "lean.yaml", "rates.yaml", "--storage", "trials.journal"]
    finished_search(workdir, script, argv)
    store = Trials(read(workdir, trials=3, metrics=metrics), workdir / "trials.journal")
    folder = workdir / "logs/search-rates"
    files = sorted(folder.glob("*.yaml"))
    kind = "best" if len(metrics) == 1 else "front"
    assert [path.name for path in files] == [f"{kind}-{number:04d}.yaml" for number in store.best()]
    own = store.results()[store.best()[0]]
    config = RunConfig.read(files[0])
    assert config.model["params"]["trainable"]["learning_rate"] == own.settings[RATE]
    assert (config.name, config.data["params"]["class_word"]) == (f"rates-{own.number:04d}", "dog")
    page = (folder / "search.html").read_text()
    assert all(f"Trial {number}</summary>" in page for number in range(3)) and "data:image" in page
    assert all(f"{key}: {value}" in page for key, value in own.settings.items())
    assert (folder / "trials.csv").read_text() == to_csv(store.results(), metrics)
    assert len((folder / "trials.csv").read_text().splitlines()) == 4

    unlink = Path.unlink  # another process ends at once, and is a little faster
    gone = lambda path, **how: unlink(path, missing_ok=True) or unlink(path, **how)  # noqa: E731
    monkeypatch.setattr(Path, "unlink", gone)
    assert {path.name for path in script_of_search.publish(store, "again")} > {path.name for path in files}


def test_every_process_gets_the_whole_command(workdir: Path, optuna: Any, monkeypatch: pytest.MonkeyPatch):
    """With --allow, and each obeys it."""
    monkeypatch.setattr(script_of_search, "check_search", lambda search: None)
    started: list[tuple] = []
    monkeypatch.setattr(script_of_search, "run_in_processes", lambda *given: started.append(given))
    read(workdir)
    (workdir / "mine.py").touch()
    monkeypatch.syspath_prepend(workdir)
    argv = ["--base", "lean.yaml", "rates.yaml", "--processes", "3", "--allow", "mine"]
    script_of_search.run_search(command_of_search.parse(argv), argv)
    assert started == [(sys.argv[0], argv, 3)]
    worked: list[int] = []
    monkeypatch.setattr(script_of_search, "Worker", lambda store, processes: lambda: worked.append(processes))
    script_of_search.run_search(command_of_search.parse([*argv, "--worker"]), argv)
    assert worked == [3] and "mine." in targets.ALLOWED and len(started) == 1


OWN = '''
from ldm.pipeline import Text2Image


class Brightness:
    """How bright the samples are."""

    better = {"brightness": "higher"}
    guidance_base = False

    def __init__(self, *, steps: int = 2):
        self.sampling = {"steps": steps}

    def unfit(self, photos, prompts):
        return []

    def subject(self, photos):
        return None

    def measure(self, pipeline: Text2Image, *, subject, prompts, is_base=False):
        how = {"sampler": "ddim", "guidance_scale": 1.0, **self.sampling}
        (sample,) = pipeline([prompts.subject], seeds=[1], batch_size=1, **how)
        return sample.image.convert("L").resize((1, 1)).getpixel((0, 0)) / 255

    def summary(self, after, base, subject):
        return {"brightness": after}

    def score(self, metrics):
        return metrics["brightness"]

    def measure_images(self, samples, *, subject, prompts, of_class):
        return {}
'''


def killed_at(number: int, point: str, keep: Callable) -> Callable:
    """`Trials.keep`, but the process is killed at a point of a trial."""

    def kept(self: Trials, trial: Any, at: str, values: list[float]) -> None:
        if (trial.number, at) == (number, point):
            raise Killed
        keep(self, trial, at, values)

    return kept


def test_true_runs_of_a_killed_search_are_those_of_a_whole_one(
    words: list[str], workdir: Path, subject_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """A trial of a tiny model, on an evaluation of one's own; killed in its middle."""
    pytest.importorskip("optuna")
    (workdir / "brightness.py").write_text(OWN)
    monkeypatch.syspath_prepend(workdir)
    targets.allow("brightness")
    content = {
        "title": "A true search",
        "trials": 1,
        "keys": {RATE: {"log": [1.0e-4, 1.0e-2]}},
        "subjects": {"disc": {"class_word": "disc", "photos": str(subject_folder)}},
        "seeds": [1],
        "set": [
            "evaluation={target: brightness.Brightness}",
            *("online_eval.every_steps=2", "checkpoint_every=1", "ema_decay=0.5"),
        ],
    }
    found: dict[str, tuple[list, list[Mapping], dict]] = {}
    for name in ("whole", "killed"):
        (workdir / f"{name}.yaml").write_text(yaml.safe_dump(content))
        search = Search.read(f"{name}.yaml", base=["tiny.yaml"])
        check_search(search)
        if name == "killed":
            with monkeypatch.context() as patched, pytest.raises(Killed):
                patched.setattr(Trials, "keep", killed_at(0, "0/4", Trials.keep))
                Worker(Trials(search, search.folder / "trials.journal"))()
            assert list(search.folder.glob("trial-0000*/checkpoints/step-00000003.ckpt"))
        store = Trials(search, search.folder / "trials.journal")
        Worker(store)()
        paths = sorted(search.folder.glob("trial-*/metrics.json"))
        metrics = [json.loads(path.read_text()) for path in paths]
        kept = [{key: m[key] for key in ("brightness", "measures", "best_step")} for m in metrics]
        model = load_file(search.folder / "trial-0000--disc--1/model.safetensors")
        found[name] = (outcome(store), kept, {key: tensor.numpy().tobytes() for key, tensor in model.items()})
        (workdir / "logs").rename(f"logs-{name}")  # or the second search would take the first one's run
    assert found["whole"][:2] == found["killed"][:2] and len(found["whole"][1]) == 1
    assert (
        found["whole"][2] == found["killed"][2]
    ) is True  # without a text of the difference, which is long
    assert [row["step"] for row in found["whole"][1][0]["measures"]] == [2, 4]


def test_scripted_runs_stand_in_for_runs(script: Callable):
    """What the other tests rest on."""
    assert isinstance(script(fidelity), ScriptedRuns) and isinstance(grid.run_job, ScriptedRuns)
