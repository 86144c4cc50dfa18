"""The metrics of a model beside its base's, or of folders of images: what `evaluate.py` does."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ldm.annotations import Node
from ldm.checkpoints import run_checkpoint
from ldm.checkpoints.find_model import find_model
from ldm.checkpoints.save import DTYPES
from ldm.config import check, instantiate, takes
from ldm.data.buckets import Shape
from ldm.data.dreambooth import DreamBoothDataModule
from ldm.engine.device import DEVICE, keep_freed_memory
from ldm.errors import UserError
from ldm.evaluation.image_folder import read_image_folder
from ldm.evaluation.protocol import Evaluation
from ldm.evaluation.storybook import StorybookEvaluation
from ldm.evaluation.subjects import JudgedSubjects
from ldm.files import atomic_write, make_folder
from ldm.model_file import use_device
from ldm.pipeline import Text2Image
from ldm.precision import resolve_precision
from ldm.reports.metric_rows import BESIDE, metric_rows
from ldm.reports.metrics_plot import metrics_plot
from ldm.runs.before_after import judged_subjects
from ldm.runs.buckets import bucket_unit, lacks_unit
from ldm.runs.folder import new_folder
from ldm.runs.run import write_json
from ldm.runs.sampling import in_shapes
from ldm.runs.untrained import base_pipeline
from ldm.sampler_nodes import sampler_label
from ldm.schema import RunConfig
from ldm.shipped import find_file
from ldm.targets import allow

BASE = "ldm/storybook/assets/base.safetensors"
SAMPLING = (  # of a run
    "sampler",
    "spacing",
    "steps",
    "guidance_scale",
    "guidance_base",
    "batch_size",
    "precision",
)
MEASURED = (  # of a run's data
    "subject_root",
    "class_word",
    "identifier",
    "subject_prompt",
    "prior_prompt",
    "concepts",
    "size",
    "buckets",
    "hold_out",
    "skip_unreadable",
)
REQUIRED = ("subject_root", "class_word")  # of a subject, where a run has no `concepts`
METRICS = {
    "storybook": "ldm.evaluation.storybook.StorybookEvaluation",
    "photos": "ldm.evaluation.photos.PhotoEvaluation",
    "vlm": "ldm.evaluation.vlm.VlmEvaluation",
}


def run_config(model: Path | None) -> RunConfig | None:
    """The config of the run that a model file or a checkpoint lies in; None without one."""
    places = [] if model is None else [model.with_name("config.yaml"), run_checkpoint.config_of(model)]
    path = next((path for path in places if path is not None and path.is_file()), None)
    return RunConfig.read(path) if path else None


def evaluation_of(options: Namespace, config: RunConfig | None) -> Evaluation:
    """The evaluation of the run, in full size, or the one that the options ask for."""
    own = (config and config.evaluation) or {}
    target = METRICS[options.metrics] if options.metrics else own.get("target", METRICS["storybook"])
    params = dict(own.get("params") or {}) if target == own.get("target") else sampling_of(config)
    if target == METRICS["storybook"]:
        params |= {"seeds": 16, "class_samples": 128}
    if options.no_diversity:
        params["diversity"] = False
    given = ("prompts", "seeds", "class_samples", "steps", "guidance_scale", "dino", "clip")
    params |= {name: getattr(options, name) for name in given if getattr(options, name) is not None}
    if options.vlm:
        params["model"] = options.vlm
    if options.guidance_base:
        params["guidance_base"] = True
    node = {"target": target, "params": params}
    if options.device and "device" not in params and takes(node, "device"):
        params["device"] = options.device  # of the judge's networks
    check({"evaluation": node}, {"evaluation": Node})
    return instantiate(node)


def sampling_of(config: RunConfig | None) -> dict[str, Any]:
    """How a run draws its samples: how it is measured where it has no such evaluation of its own."""
    return {name: getattr(config.samples, name) for name in SAMPLING} if config else {}


def photos_of(options: Namespace, config: RunConfig | None) -> DreamBoothDataModule:
    """The photos and the names of their subject, from the options, else from the run's config.

    Of the latter only what decides what is measured: no masks, captions or images of the class are needed.
    """
    params = dict(config.data["params"]) if config and config.is_dreambooth else {}
    params = {name: params[name] for name in MEASURED if name in params}
    given = {"subject_root": options.data_root, "class_word": options.class_word}
    given["identifier"] = options.identifier
    given = {name: value for name, value in given.items() if value is not None}
    if given and params.pop("concepts", None):
        params |= dict.fromkeys(("subject_root", "class_word"))
    params |= given
    lacking = [] if params.get("concepts") else [key for key in REQUIRED if params.get(key) is None]
    if lacking:
        remedy = "Give --data_root and --class_word, or a folder of a run."
        raise UserError(f"The {lacking[0]} is missing", where="evaluate.py", remedy=remedy)
    node = {"target": "ldm.data.dreambooth.DreamBoothDataModule", "params": {"size": 64} | params}
    data: DreamBoothDataModule = instantiate(node)
    if config is not None and lacks_unit(data):
        with torch.device("meta"):
            data.unit = bucket_unit(instantiate(config.model).networks)
    data.check()
    return data


def evaluate(options: Namespace, model: Path | None) -> Mapping[str, Any]:
    """The metrics of a model with its base's, or of folders of images."""
    config = run_config(model)
    data = photos_of(options, config)
    samples = read_image_folder(options.pictures) if options.pictures else []
    of_class = read_image_folder(options.class_pictures, at_least=2) if options.class_pictures else []
    evaluation = evaluation_of(options, config)
    judged = judged_subjects(evaluation, data)
    for name, against in judged.unfit.items():
        raise UserError(". ".join(against), where=name, remedy="Take --metrics photos.")
    if not judged.subjects:
        raise UserError("Metrics are of subjects, and a style has none", where=data.concepts[0].root)
    if model is None and len(data.concepts) > 1:
        remedy = "Name one with --data_root, --class_word and --identifier."
        raise UserError("Folders of images are of one subject", where="evaluate.py", remedy=remedy)
    if model is None:
        (subject,), (prompts,) = judged.subjects.values(), judged.prompts.values()
        return evaluation.measure_images(samples, subject=subject, prompts=prompts, of_class=of_class)
    return metrics_beside_base(options, config, model=model, judged=judged, shapes=data.sample_shapes)


def metrics_beside_base(
    options: Namespace,
    config: RunConfig | None,
    *,
    model: Path,
    judged: JudgedSubjects,
    shapes: Sequence[Shape],
) -> Mapping[str, Any]:
    """The metrics of a model with its base's: that of the options, else of its run, else the storybook's."""
    placed = placement(options, judged.evaluation)
    base = base_of(options, config, **placed)
    before = judged.measure(in_shapes(base, shapes), is_base=True)
    guidance_base = base.denoiser if judged.evaluation.guidance_base else None
    del base  # its VAE, and all of it without `guidance_base`: the next model takes as much memory
    trained = Text2Image.from_file(model, guidance_base=guidance_base, **placed)
    return judged.summary(judged.measure(in_shapes(trained, shapes)), before)


def base_of(options: Namespace, config: RunConfig | None, **placed: Any) -> Text2Image:
    """The untouched base, read as the run reads its own. Raises UserError with its own remedy."""
    if config is None or not config.is_dreambooth:
        named = options.base or (config and config.base_checkpoint) or BASE
        return Text2Image.from_file(find_file(named), **placed)
    if options.base is not None:
        named = str(find_model(find_file(options.base)))
        return base_pipeline(replace(config, base_checkpoint=named, base_parts=None), **placed)
    try:
        return base_pipeline(config, **placed)
    except UserError as error:
        what = f"The base of the run cannot be had: {error.what}"
        raise UserError(what, where=error.where, remedy="Name it with --base FILE.") from error


def placement(options: Namespace, evaluation: Evaluation) -> dict[str, Any]:
    """Device and dtype of the networks: of the options, else the first GPU, in the evaluation's precision."""
    device = options.device or DEVICE
    use_device(device)
    precision = resolve_precision(evaluation.sampling.get("precision", "auto"), device)
    return {"device": device, "dtype": DTYPES[precision]}


def table(metrics: Mapping[str, Any]) -> str:
    """A row per metric: value, interval, base, photos and noise floor, where there are any."""
    rows = [("", "measured", "95 %", "base", "photos", "noise")]
    for row in metric_rows(metrics):
        beside = [str(row.beside.get(key, "")) for key in BESIDE]
        rows.append((row.name, f"{row.value:.3f}", row.interval, *beside))
    lines = ["{:30}{:>8}{:>18}{:>9}{:>9}{:>9}".format(*row).rstrip() for row in rows]
    if sampling := metrics.get("sampling"):
        told = {name: sampler_label(how) if name == "sampler" else how for name, how in sampling.items()}
        lines.append(", ".join(f"{name} {value}" for name, value in told.items() if value is not None))
    return "\n".join(lines)


def results_folder(options: Namespace, model: Path | None) -> Path:
    """The folder of the results, made: `--out`, or `evaluation` in the model's run, or a new one in logs/.

    In a run a checkpoint has its own, and so has what `--metrics` or `--captions` ask for.
    """
    if options.out is not None:
        return make_folder(options.out)
    asked = "captions" if options.captions else options.metrics or ""
    if model is not None and model.with_name("config.yaml").is_file():
        return make_folder(model.parent / "evaluation" / asked)
    if model is not None and (config := run_checkpoint.config_of(model)) is not None:
        return make_folder(config.parent / "evaluation" / model.stem / asked)
    wanted = Path("logs") / f"evaluation-{(model or options.pictures).stem}"
    return new_folder(wanted, remedy="Name another with --out FOLDER.")


def _check_flags(options: Namespace) -> None:
    """Raises UserError for flags of which one would be without effect."""
    if options.captions and options.pictures:
        what = "Captions are drawn by a model, and --pictures are images of any tool"
        raise UserError(what, where="--captions", remedy="Take one of the two off.")
    if options.class_pictures and not options.pictures:
        remedy = "Give those of the subject with --pictures, or take it off: a model draws its own."
        raise UserError(
            "Images of the class are beside those of the subject", where="--class_pictures", remedy=remedy
        )


def evaluate_model(options: Namespace) -> None:
    """Measures what the options of `evaluate.py` name; prints a table and writes its files."""
    allow(*options.allow)
    _check_flags(options)
    if options.out is not None:
        make_folder(options.out)  # before the work whose results it is for
    keep_freed_memory()
    given = find_file(BASE) if options.captions and options.model is None else options.model
    model = None if options.pictures else find_model(given)
    print(f"images: {options.pictures}" if model is None else f"model: {model}")
    if options.captions:
        asked = {"steps": options.steps, "guidance_scale": options.guidance_scale}
        evaluation = StorybookEvaluation(**{name: x for name, x in asked.items() if x is not None})
        pipeline = Text2Image.from_file(model, **placement(options, evaluation))
        metrics = evaluation.examine(pipeline, samples=options.captions)
    else:
        metrics = evaluate(options, model)
    print(table(metrics))
    folder = results_folder(options, model)
    print(write_json(folder / "metrics.json", metrics))
    with atomic_write(folder / "figures.svg") as temporary:
        temporary.write_text(metrics_plot(metrics), encoding="utf-8")
    print(folder / "figures.svg")
