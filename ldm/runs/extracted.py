"""LoRAs that are extracted from the models of full training, and measured as their runs were."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoints.extract_lora import lora_between
from ldm.checkpoints.load import open_model
from ldm.checkpoints.lora import save_lora
from ldm.config import instantiate
from ldm.engine.device import device_of
from ldm.engine.locks import share
from ldm.files import make_folder
from ldm.pipeline import Text2Image
from ldm.runs.before_after import judged_subjects
from ldm.runs.buckets import build_data
from ldm.runs.grid import Job, metrics_of, write_text
from ldm.runs.memory import module_on_meta
from ldm.runs.run import base_files, use_vocabulary
from ldm.runs.sampling import in_shapes
from ldm.runs.sweep import Sweep

FOLDER = "extracted"  # in that of a run: a file of metrics and a LoRA of each rank


def extract_all(sweep: Sweep, jobs: Sequence[Job]) -> None:
    """Measures the LoRAs that a study asks for of finished runs, of each run those that are missing."""
    asked = {
        job.folder.name: job for job in jobs if job.variant in sweep.extracted and metrics_of(job) is not None
    }

    def finish(number: int, name: str) -> None:
        print(f"{sweep.name}, LoRAs of run {number} of {len(asked)}: {name}", flush=True)
        measure(asked[name], missing_ranks(sweep, asked[name]))

    def is_done(name: str) -> bool:
        return not missing_ranks(sweep, asked[name])

    share(list(asked), sweep.folder / "locks" / FOLDER, is_done=is_done, finish=finish)


def missing_ranks(sweep: Sweep, job: Job) -> list[int]:
    """The ranks whose LoRAs of a run are still to be measured."""
    return [rank for rank in sweep.extracted.get(job.variant, ()) if not _metrics_file(job, rank).exists()]


def metrics_of_loras(sweep: Sweep, job: Job) -> dict[int, dict[str, Any]]:
    """Rank -> what `extract_all` measured of the LoRA of a run."""
    return {
        rank: json.loads(_metrics_file(job, rank).read_text(encoding="utf-8"))
        for rank in sweep.extracted.get(job.variant, ())
    }


def measure(job: Job, ranks: Sequence[int]) -> None:
    """Writes the LoRAs of a finished run, and their metrics by the run's own evaluation.

    Besides these, the share of the squared change that they hold (`kept`), and the share of it that no LoRA
    has layers for (`elsewhere`).
    """
    config = job.config
    device = device_of(config.trainer)
    base_file = base_files(config)["all"]
    tuned, base = open_model(job.folder / "model.safetensors"), open_model(base_file)
    data = build_data(config, module_on_meta(config))
    data.check()
    judged = judged_subjects(instantiate(config.evaluation), data)

    def measured(loras: Sequence[tuple[Path, float]], **how: bool) -> dict[str, Any]:
        how_read = {"config": config.container, "device": device}  # with the run's size and schedule
        how_read["guidance_base"] = base_file if judged.evaluation.guidance_base and loras else None
        pipeline = Text2Image.from_file(base_file, loras=loras, **how_read)
        use_vocabulary(pipeline.text_encoder, base.tokenizer)
        return judged.measure(in_shapes(pipeline, data.sample_shapes), **how)

    before = measured([], is_base=True)
    for rank in ranks:
        lora = lora_between(tuned, base, rank)
        file = make_folder(_metrics_file(job, rank).parent) / f"lora-{rank}.safetensors"
        save_lora(file, lora.layers, base.state_dicts, dtype=torch.float16)
        metrics = judged.summary(measured([(file, 1.0)]), before)
        metrics |= {"kept": lora.kept, "elsewhere": lora.elsewhere}
        write_text(_metrics_file(job, rank), json.dumps(metrics, indent=2) + "\n")


def _metrics_file(job: Job, rank: int) -> Path:
    return job.folder / FOLDER / f"lora-{rank}.json"
