"""LoRAs extracted from a study's runs: measured as these, each once, nearer the higher the rank."""

import csv
import json
from argparse import Namespace
from pathlib import Path

import pytest

from ldm.checkpoints.load import open_model
from ldm.checkpoints.lora import merge_lora, read_lora
from ldm.errors import UserError
from ldm.runs.sweep import baselines_of, jobs_of, read_sweep
from ldm.runs.sweep_results import run_study
from tests.runs.test_sweep import ROOT, write

RANKS = [1, 999]
SHORT = [  # four steps, of which something is learnt
    *("trainer.max_steps=4", "trainer.val_check_interval=4", "trainer.accelerator=cpu"),
    *("data.params.num_priors=0", "data.params.validation_batches=1", "model.params.lr_schedule=constant"),
    *("samples.n=1", "samples.steps=2", "samples.every_steps=0", "online_eval.every_steps=0"),
    "evaluation.params={seeds: 1, class_samples: 4, sampler: ddim, steps: 2, guidance_scale: 1.0}",
]
LOKR = "{kind: lokr}"
DOG = {"dog": {"class_word": "dog", "photos": str(ROOT / "ldm/storybook/assets/subjects/dog")}}
ASKED = {
    "variants": {"full": [], "without text": ["model.params.trainable.text_encoder=false"]},
    "subjects": DOG,
    "seeds": [1],
    "set": SHORT,
    "metrics": ["subject_fidelity", "class_shift"],
    "extracted": {"full": RANKS},
}


def options(path: Path) -> Namespace:
    return Namespace(base=[path], allow=[], processes=1, worker=False, out=Path("studies"))


def test_a_study_measures_the_loras_of_its_runs(workdir: Path):
    path = write(workdir, **ASKED)
    run_study(options(path))
    rows = {row["variant"]: row for row in csv.DictReader(open("studies/weights.csv"))}
    assert list(rows) == ["full", "full as LoRA 1", "full as LoRA 999", "without text"]
    run = jobs_of(read_sweep(path))[0].folder
    own = json.loads((run / "metrics.json").read_text())
    found = {rank: json.loads((run / f"extracted/lora-{rank}.json").read_text()) for rank in RANKS}
    for rank, metrics in found.items():
        assert metrics["base"] == own["base"], "the same images of the base, measured in the same way"
        assert float(rows[f"full as LoRA {rank}"]["class_shift"]) == metrics["class_shift"]
        assert metrics["elsewhere"] == found[1]["elsewhere"] < 0.5
    assert found[999]["kept"] == pytest.approx(1 - found[999]["elsewhere"]) and found[1]["kept"] < 0.9
    assert found[999]["class_shift"] == pytest.approx(own["class_shift"], abs=0.05)

    (run / "extracted/lora-999.json").unlink()  # as a killed process leaves it
    first = (run / "extracted/lora-1.json").stat().st_mtime_ns
    run_study(options(path))
    assert json.loads((run / "extracted/lora-999.json").read_text()) == found[999]
    assert (run / "extracted/lora-1.json").stat().st_mtime_ns == first

    base, tuned = (
        open_model(file).state_dicts
        for file in (ROOT / "ldm/storybook/assets/base.safetensors", run / "model.safetensors")
    )
    name = "input_blocks.1.0.in_layers.2.weight"
    merged = merge_lora(base, read_lora(run / "extracted/lora-999.safetensors", base), weight=1.0)
    change = (tuned["unet"][name] - base["unet"][name]).norm()
    assert change > 0 and (merged["unet"][name] - tuned["unet"][name]).norm() < 2e-3 * change


def test_they_are_measured_as_their_run_and_not_as_the_base_file_says(workdir: Path):
    """At the run's size and with its clip skip, whatever the base states."""
    own = ["data.params.size=48", "model.params.text_encoder.params.clip_skip=2"]
    more = {"variants": {"full": own}, "extracted": {"full": [1]}}
    path = write(workdir, **ASKED | more)
    run_study(options(path))
    run = jobs_of(read_sweep(path))[0].folder
    of_lora = json.loads((run / "extracted/lora-1.json").read_text())
    assert of_lora["base"] == json.loads((run / "metrics.json").read_text())["base"]


def test_rows_of_loras_are_compared_with_the_baseline(workdir: Path):
    sweep = read_sweep(write(workdir, **ASKED))
    rows = ["full", "full as LoRA 1", "full as LoRA 999", "without text"]
    assert baselines_of(sweep, rows) == dict.fromkeys(rows[1:], "full")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extracted": {"no": [4]}}, "`no` of `extracted` is not a variant.*full, without text"),
        ({"extracted": {"full": [0]}}, "extracted"),
        ({"extracted": {"full": [4]}, "at": {"subject_fidelity": [0.8]}}, "read at the end of a run"),
        (
            {"set": [*SHORT, "model.params.trainable.lora={target: ldm.models.lora.LoRA}"]},
            "`full` is no full training from one base.*weights: extracted",
        ),
        ({"set": [*SHORT, f"model.params.trainable.adapter={LOKR}"]}, "`full` is no full training"),
        ({"set": [*SHORT, "base_parts={vae: a.safetensors}"]}, "`full` is no full training"),
    ],
)
def test_what_no_lora_can_be_extracted_of_is_refused_before_any_run(
    workdir: Path, changes: dict, message: str
):
    with pytest.raises(UserError, match=message):
        jobs_of(read_sweep(write(workdir, **ASKED | changes)))
