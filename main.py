"""The whole job from one config: prior images, training, samples, figures, model file.

    python main.py --base configs/dreambooth.yaml [more.yaml ...] [key.sub=value ...]

Files are merged from left to right, then the overrides.
"""

import logging
import sys
from pathlib import Path

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from ldm.config import instantiate, save_config, to_plain
from ldm.data.dreambooth import DreamBoothDataModule
from ldm.data.images import load_image
from ldm.data.priors import PriorSet
from ldm.data.prompts import fill
from ldm.errors import UserError
from ldm.evaluation.curves import read_curves
from ldm.evaluation.report import Report, Row, write_report
from ldm.pipeline import Text2Image
from ldm.training import run
from ldm.training.callbacks import Previews, Speed, peak_memory_mib
from ldm.training.latent_diffusion import LatentDiffusion
from ldm.training.options import parse
from ldm.training.sampling import (
    PriorDrawing,
    SampleDrawing,
    draw_priors,
    draw_samples,
    prior_set,
    text2image,
)
from ldm.training.score import Score

SHOWN_PRIORS = 32  # on the report's page


def main(config: DictConfig, resume: Path | None = None) -> list[Path]:
    """Runs the job that `config` describes, or continues the one in `resume` -> the paths it leaves."""
    plain = to_plain(config)
    data = instantiate(plain["data"])
    if isinstance(data, DreamBoothDataModule):
        data.check()
    base = plain.get("base_checkpoint")
    if base and not run.find_file(base).exists():
        raise UserError(
            "There is no base checkpoint",
            where=base,
            remedy="Name one with --actual_resume FILE; README says how the storybook's is trained.",
        )
    folder = resume or run.new_folder(Path("logs") / plain["name"])
    save_config(config, folder / "config.yaml")
    pl.seed_everything(plain["seed"], verbose=False)
    module = instantiate(plain["model"])
    if base:
        base_hash = run.load_base(module.networks, base, plain.get("base_parts"))
        if isinstance(module, LatentDiffusion):
            data.attach(encode=module.encode_images, vae_hash=base_hash)
    if isinstance(data, DreamBoothDataModule):
        return dreambooth(module, data, plain, folder, base_hash=base_hash if base else "")
    run.fit(module, data, folder=folder, callbacks=[Speed()], **training_options(plain))
    return [export(module, plain, folder)]


def dreambooth(
    module: pl.LightningModule, data: DreamBoothDataModule, plain: dict, folder: Path, *, base_hash: str
) -> list[Path]:
    """Prior images, pictures and figures of the base, training, pictures and figures of the result."""
    watch, draw = run.Stopwatch(), text2image(module, size=data.size)
    draw.latent_shape()  # the size suits the networks
    score = Score(plain.get("evaluation"), draw, data)
    samples = SampleDrawing(**plain.get("samples", {}))
    prompts = [fill(prompt, **data.words) for prompt in samples.prompts]
    with watch("prior_images"):
        priors = priors_of(data, draw, plain, base_hash=base_hash) if data.draws_priors else None
    data.attach(encode=module.encode_images, vae_hash=base_hash, priors=priors)
    with watch("samples_before"):
        before = draw_samples(draw, samples, prompts, progress=True)
    with watch("figures_before"):
        score.before()
    callbacks = [Speed()]
    if samples.every_steps:
        callbacks.append(Previews(draw, samples, prompts, folder / "samples"))
    with watch("training"):
        run.fit(module, data, folder=folder, callbacks=callbacks, **training_options(plain))
    model = export(module, plain, folder, size=data.size)
    with watch("samples_after"):
        after = draw_samples(draw, samples, prompts, progress=True)
    with watch("figures_after"):
        figures = score.after()
    sheet = run.leave_pictures(folder / "samples", before, after)
    metrics = {
        **figures,
        "seconds": watch.seconds,
        "peak_memory_mib": round(peak_memory_mib(), 1),
        "prior_images": data.num_priors if data.draws_priors else 0,
    }
    run.write_json(folder / "metrics.json", metrics)
    return [sheet, model, report_on(folder, data, before, after, metrics)]


def report_on(
    folder: Path, data: DreamBoothDataModule, before: run.Rows, after: run.Rows, metrics: dict
) -> Path:
    """The run on one page -> report.html."""
    pairs = zip(before, after, strict=True)
    steps = {int(path.stem.split("-")[1]): path for path in sorted(folder.glob("samples/step-*.png"))}
    report = Report(
        title=f"{folder.name}: {data.subject_prompt}",
        subject=[load_image(photo.path) for photo in data.subject_photos],
        priors=[load_image(photo.path) for photo in data.prior_photos[:SHOWN_PRIORS]],
        rows=[Row(prompt, old, new) for (prompt, old), (_, new) in pairs],
        figures=metrics,
        seconds=metrics["seconds"],
        curves=read_curves(folder / "tensorboard"),
        config=(folder / "config.yaml").read_text(encoding="utf-8"),
        previews=[(step, load_image(path)) for step, path in steps.items()],
    )
    return write_report(folder / "report.html", report)


def priors_of(data: DreamBoothDataModule, draw: Text2Image, plain: dict, *, base_hash: str) -> PriorSet:
    """The prior images, drawn as far as they are missing."""
    drawing = PriorDrawing(**plain.get("priors", {}))
    priors = prior_set(data, drawing, base_sha256=base_hash)
    draw_priors(draw, priors, data.num_priors, batch_size=drawing.batch_size)
    return priors


def training_options(plain: dict) -> dict:
    """The sections of the config that `run.fit` takes."""
    return {key: plain[key] for key in ("trainer", "logger", "ema_decay", "checkpoint_every") if key in plain}


def export(module: pl.LightningModule, plain: dict, folder: Path, *, size: int | None = None) -> Path:
    options = run.Export(**plain.get("export", {}))
    params = plain["model"]["params"]
    size = size or plain["data"]["params"].get("size", 64)
    return run.export(module, folder / "model.safetensors", params=params, size=size, dtype=options.dtype)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    try:
        config, options = parse(sys.argv[1:], description=__doc__)
        if options.dry_run:
            print(OmegaConf.to_yaml(config, resolve=True))
        else:
            print(*main(config, options.resume), sep="\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
