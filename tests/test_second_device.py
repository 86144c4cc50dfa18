"""Whole runs on a second device, which computes on the CPU and refuses what a GPU refuses."""

import json
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

from tests.end_to_end.test_sdxl import LORA as XL_LORA
from tests.end_to_end.test_sdxl import base, job  # noqa: F401
from tests.factories import DORA, LORA, masks

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.log_every_n_steps=100"]
SGD = "model.params.optimizer={target: torch.optim.SGD, params: {momentum: 0.9}}"  # no rounding grows in it
TEACHER = "model.params.objective.prior_target=teacher"
EMPTY = "data.params.prior_caption_dropout=0.5"
NO_PRIORS = "data.params.num_priors=0"
DCO = "model.params.objective.subject_loss={target: ldm.training.dco.DCO, params: {beta: 1000}}"
MASKS = "model.params.objective.masks={outside: 1.0, outside_target: teacher}"
UNCACHED = "data.params.cache_latents=false"
CHECKPOINTED = "model.params.unet.params.use_checkpoint=true"
TOKEN = "{target: ldm.training.techniques.LearnedToken, params: {word: <me>, init: disc}}"
LEAN = "model.params.optimizer={target: ldm.optim.fused_backward.FusedBackward, params: {optimizer: adamw}}"
EQUAL = {
    "plain": ["ema_decay=0.9", TEACHER, EMPTY],
    "split": ["trainer.accumulate_grad_batches=2", "samples.guidance_base=true", "samples.every_steps=1"],
    "masks": [NO_PRIORS, MASKS, CHECKPOINTED],
    "buckets": ["data.params.buckets={}", "ema_decay=0.9", "ema_device=cpu", UNCACHED],
    "dco": [NO_PRIORS, DCO],
    "lora": [LORA, TEACHER, EMPTY, "samples.guidance_base=true", "ema_decay=0.9"],
    "dora": [DORA, NO_PRIORS, TEACHER, "data.params.diff_output_preservation=true"],
    "token": ["data.params.identifier=<me>", f"model.params.trainable.learned_token={TOKEN}"],
    "online": ["data.params.online_priors=true", "model.params.objective.l2_sp_weight=0.1"],
}
OPTIMIZERS = {
    "adamw": ["ema_decay=0.9", "trainer.gradient_clip_val=1.0"],
    "lean": [LEAN],
    "lean_bf16": [LEAN.replace("adamw", "adamw_bf16"), "trainer.precision=bf16-true"],
    "schedule_free": ["model.params.optimizer=schedule_free"],
    "moments": ["model.params.optimizer=adamw_bf16_moments", "trainer.gradient_clip_val=1.0"],
    "lion": ["model.params.optimizer=lion"],
}
GUARD, AVERAGE = "engine/non_finite.py: __init__", "engine/averaging.py: _update_apart"
TABLE = {"optim/adamw_bf16.py: _table": 1}  # of random numbers, in the first step
IN_STEPS = {  # none is logged; copies that nothing waits for: what is finite, weights to be averaged
    **dict.fromkeys((*EQUAL, *OPTIMIZERS), {GUARD: 4}),
    "lean": {GUARD: 2},
    "lean_bf16": {GUARD: 2, **TABLE},
    "moments": {GUARD: 4, **TABLE},
    "buckets": {GUARD: 4, AVERAGE: 2},
}
DRAW = ("split", "online")  # pictures between the steps


def done(jobs: dict[str, list[str]], *, equal: Collection[str]) -> dict[str, dict]:
    """Of each run what `second_device_jobs` says of it."""
    Path("jobs.json").write_text(json.dumps({"equal": list(equal), "jobs": jobs}))
    command = [sys.executable, "-m", "tests.second_device_jobs", "jobs.json", "results.json"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    found = json.loads(Path("results.json").read_text())
    assert found["refused"] == ["sum", "product", "index", "values", "generator"]
    return found["results"]


def test_runs_on_another_device(words: list[str], subject_folder: Path, workdir: Path):
    """Nothing is of two devices, no step waits for one, and what is trained is what the CPU trains."""
    masks(subject_folder)
    jobs = {name: [*words, *SHORT, SGD, *more] for name, more in EQUAL.items()}
    jobs |= {name: [*words, *SHORT, *more] for name, more in OPTIMIZERS.items()}
    results = done(jobs, equal=EQUAL)
    assert {name: found["error"] for name, found in results.items()} == dict.fromkeys(results)
    assert {name: found["apart"] for name, found in results.items()} == dict.fromkeys(results, {})
    in_steps = {name: found["in_steps"] for name, found in results.items() if name not in DRAW}
    assert in_steps == {name: counts for name, counts in IN_STEPS.items() if name not in DRAW}


def test_sdxl_on_another_device(job: list[str]):  # noqa: F811
    quiet = [*job, "trainer.log_every_n_steps=100", SGD, "trainer.val_check_interval=2"]
    results = done({"full": quiet, "lora": [*quiet, *XL_LORA[1:]]}, equal=("full", "lora"))
    wanted = {"error": None, "apart": {}, "in_steps": {GUARD: 4}}
    assert results == {"full": wanted, "lora": wanted}
