"""The whole job from one config: prior images, training, samples, figures, model file."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from ldm.config import instantiate, save_config, to_plain
from ldm.data.dreambooth import DreamBoothDataModule
from ldm.data.images import load_image
from ldm.data.priors import PriorSet
from ldm.data.prompts import fill
from ldm.evaluation.curves import read_curves
from ldm.evaluation.report import Report, Row, write_report
from ldm.pipeline import Text2Image
from ldm.training import ranks, run
from ldm.training.callbacks import AutoencoderAside, FirstStep, Previews, Speed, peak_memory_mib
from ldm.training.checkpoints import check_saving
from ldm.training.device import device_of, set_matmul_precision
from ldm.training.folder import claimed, folder_of
from ldm.training.latent_diffusion import LatentDiffusion
from ldm.training.memory import estimate, report
from ldm.training.sampling import (
    PriorDrawing,
    SampleDrawing,
    draw_priors,
    draw_samples,
    prior_set,
    text2image,
)
from ldm.training.score import Score

# The sections that `run.fit` takes
TRAINING = ("trainer", "logger", "ema_decay", "ema_device", "checkpoint_every", "checkpoints_kept")
SHOWN_PRIORS = 32  # on the report's page


def run_job(
    config: DictConfig, resume: str | None = None, *, allow_config_change: bool = False
) -> list[Path]:
    """Runs the job that `config` describes, or continues the one in `resume` -> the paths it leaves.

    "auto" continues the newest unfinished run of the config's name, if there is one.
    """
    plain = to_plain(config)
    plain["trainer"] = ranks.join(plain["trainer"])
    data = instantiate(plain["data"])
    if isinstance(data, DreamBoothDataModule):
        data.check()
    run.base_files(plain)
    check_saving(plain)
    pl.seed_everything(plain["seed"], verbose=False)
    set_matmul_precision(plain.get("matmul_precision", "high"))
    module = instantiate(plain["model"])
    if isinstance(module, LatentDiffusion):
        module.check(plain["trainer"])
    folder = ranks.by_first(
        lambda: folder_of(to_plain(config), resume, allow_config_change=allow_config_change)
    )
    with claimed(folder) if ranks.rank() == 0 else nullcontext():
        if ranks.rank() == 0:
            save_config(config, folder / "config.yaml")
        return _train(module, data, plain, folder)


def _train(module: pl.LightningModule, data: pl.LightningDataModule, plain: dict, folder: Path) -> list[Path]:
    """Fills the networks from the base, trains, exports -> the paths that rank 0 leaves."""
    files, base_hash = run.base_files(plain), ""
    if files:
        predicts = getattr(module, "parameterization", None)
        base_hash = run.load_base(module.networks, files, parameterization=predicts)
        module.to(device_of(plain["trainer"]))
        if isinstance(module, LatentDiffusion):
            module.add_new_word()
            data.attach(encode=module.encode_images, vae_hash=base_hash)
    if isinstance(data, DreamBoothDataModule):
        return dreambooth(module, data, plain, folder, base_hash=base_hash)
    run.fit(module, data, folder=folder, callbacks=[Speed()], **training_options(plain))
    return [] if ranks.rank() else [export(module, plain, folder)]


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
    first = ranks.rank() == 0
    with watch("samples_before"):
        before = pictures_before(draw, samples, prompts, folder) if first else []
    with watch("figures_before"):
        if first:
            score.before()
    callbacks = [Speed(), FirstStep()]
    if data.cache_latents:
        callbacks.append(AutoencoderAside())
    if samples.every_steps:
        callbacks.append(Previews(draw, samples, prompts, folder / "samples"))
    with watch("training"):
        run.fit(module, data, folder=folder, callbacks=callbacks, **training_options(plain))
    if not first:
        return []
    model = export(module, plain, folder, words=data.words, base_hash=base_hash)
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


def pictures_before(
    draw: Text2Image, samples: SampleDrawing, prompts: Sequence[str], folder: Path
) -> run.Rows:
    """What the untouched base draws; a run that is taken up has these pictures already."""
    kept, settings = folder / "samples" / "before", asdict(samples)
    for other in ("prompts", "n", "every_steps", "batch_size"):
        del settings[other]
    rows = run.load_rows(kept, prompts, samples.n, settings)
    if rows is None:
        rows = draw_samples(draw, samples, prompts, progress=True)
        run.save_rows(kept, rows, settings)
    return rows


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
    return {key: plain[key] for key in TRAINING if key in plain}


def export(
    module: pl.LightningModule, plain: dict, folder: Path, *, words: dict | None = None, base_hash: str = ""
) -> Path:
    """The model file of a run; `words` are the {identifier} and {class_word} that it was taught."""
    return run.export(
        module,
        folder / "model.safetensors",
        size=plain["data"]["params"].get("size", 64),
        dtype=run.Export(**plain.get("export", {})).dtype,
        training=plain,
        trigger_phrase=fill("{identifier} {class_word}", **words) if words else None,
        base_sha256=base_hash or None,
    )


def plan(config: DictConfig) -> str:
    """The config as it stands, and for DreamBooth the memory and disk that it needs."""
    text = OmegaConf.to_yaml(config, resolve=True)
    if config.data.target == "ldm.data.dreambooth.DreamBoothDataModule":
        text += report(*estimate(to_plain(config)))
    return text
