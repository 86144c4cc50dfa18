"""Everything that a config is refused for before its run begins: nothing is written, no weights are read.

Names, types and ranges are checked by `RunConfig.parse` already; here is what concerns several keys, files,
packages and devices. What each part of a run can and cannot do is said where that part is.
"""

import importlib.util
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from ldm.annotations import Node
from ldm.checkpoints.load import open_model
from ldm.checkpoints.vae import check_same_scale, open_vae
from ldm.config import instantiate, param_of, takes
from ldm.data.concepts import Concept, filled_for
from ldm.data.dreambooth import DreamBoothDataModule
from ldm.data.photo_check import photo_facts, troubles
from ldm.diffusion.process import NoiseProcess
from ldm.diffusion.schedule import Spacing
from ldm.engine import distributed
from ldm.engine.sharding import check_sharding
from ldm.errors import UserError
from ldm.families.family import Family
from ldm.families.known import family_of
from ldm.families.sdxl.conditioning import vector_width, warn_of_small_side
from ldm.families.sdxl.family import SDXL
from ldm.optim.optimizer_nodes import averages_weights, optimizer_of
from ldm.optim.optimizers import rounds_stochastically
from ldm.optim.schedules import Constant
from ldm.pipeline import Text2Image
from ldm.runs import run
from ldm.runs.base_agreement import check_agreement, without_scale
from ldm.runs.before_after import evaluation_nodes
from ldm.runs.buckets import build_data, check_unit
from ldm.runs.disk import require_checkpoint_space
from ldm.runs.folder import LOGS, check_name
from ldm.runs.objective_check import check_objective
from ldm.runs.online_eval import check_online_eval
from ldm.runs.prompts import check_prompts
from ldm.runs.sampling import text2image
from ldm.sampler_nodes import SamplerNode, sampling_levels
from ldm.schema import RunConfig, TrainerOptions
from ldm.storybook.training.base import StorybookBase
from ldm.training.latent_diffusion import LatentDiffusion

log = logging.getLogger(__name__)

SAMPLING = ("steps", "sampler", "spacing")  # what decides the noise levels of a sampling
LOGGERS = {  # class of a logger -> the package that it needs
    "WandbLogger": "wandb",
    "CometLogger": "comet_ml",
    "MLFlowLogger": "mlflow",
    "NeptuneLogger": "neptune",
}


def validate(
    config: RunConfig, *, download: bool = True, run_folder: Path | None = None
) -> pl.LightningDataModule:
    """Raises UserError for a config whose run cannot end well on this machine -> its data, which is read.

    run_folder: of a run that goes on, whose checkpoints are there. A base of the hub is downloaded when all
    else is right; `download` false only asks for its size.
    """
    check_name(config.name)
    distributed.check_devices(config.trainer)
    check_sharding(config)
    check_online_eval(config)
    _check_logger(config)
    bases = run.base_names(config)
    with torch.device("meta"):
        module = instantiate(config.model)
    run.check_parts(bases, getattr(module, "networks", {}))
    if isinstance(module, LatentDiffusion):
        processes = distributed.process_count(config.trainer)
        module.check(config.trainer, processes=processes)
        _check_learning(module, config.trainer, processes=processes)
        _warn_of_lost_updates(module, config.trainer)
        _check_networks(module)
    _check_average(config, module)
    if config.is_dreambooth:
        data = _check_dreambooth(config, module, bases)
    else:
        data = instantiate(config.data)
        _check_other_run(config)
    where = {"run": run_folder or LOGS / config.name, "is_new": run_folder is None}
    require_checkpoint_space(config, module, evaluate_every=config.online_eval.every_steps, **where)
    vocabulary = _check_bases(config, module, bases, download=download)
    if config.is_dreambooth:
        check_prompts(config, module, data, vocabulary, download=download)
    return data


def _check_dreambooth(config: RunConfig, module: Any, bases: Collection[str]) -> DreamBoothDataModule:
    """Refuses a DreamBooth run by its photos, prompts, base and evaluations -> its data."""
    if not isinstance(module, LatentDiffusion) or isinstance(module, StorybookBase):
        remedy = "Set model.target=ldm.training.latent_diffusion.LatentDiffusion."
        raise UserError("This model does not learn from photos", where="model.target", remedy=remedy)
    if "all" not in bases and not set(bases) >= module.networks.keys():
        remedy = "Name one with --actual_resume FILE."
        raise UserError("DreamBooth needs a base to train on", where="base_checkpoint", remedy=remedy)
    if not any(module.trainable.rates(module.networks)):
        remedy = "Raise model.params.trainable.learning_rate."
        raise UserError(
            "Every learning rate is 0", where="model.params.trainable.learning_rate", remedy=remedy
        )
    data = build_data(config, module)
    pipeline = text2image(module, size=data.size)
    pipeline.latent_shape()  # refuses a size that the networks cannot halve
    check_unit(data, module.networks)
    data.check()
    if _family(module) is SDXL:
        warn_of_small_side(min(map(min, data.buckets_in_use.shapes)), where="data.params.size")
    check_objective(module, data)
    _look_at(data)
    nodes = evaluation_nodes(config)
    _check_sampling(config, nodes, module.process, concepts=data.concepts)
    _check_drawn(pipeline, vars(config.samples), where="samples")
    for key, node in nodes.items():
        evaluation = instantiate(node)  # reads its own networks and prompts
        _check_drawn(pipeline, getattr(evaluation, "sampling", {}), where=f"{key}.params")
    return data


def _look_at(data: DreamBoothDataModule) -> None:
    """Says what to look at in the photos, a line for each kind; `data.check` says which are small."""
    shape_of = data.buckets_in_use.shape_of
    for concept in data.concepts:
        shapes = {photo.path: shape_of(photo) for photo in data.images.photos[concept.name]}
        photos = photo_facts(list(shapes), mask_root=data.mask_root, shape_of=shapes.__getitem__)
        for trouble in troubles(photos, captions=data.images.options.captions is True):
            log.warning("%s: %s", concept.root, trouble)


def _check_bases(config: RunConfig, module: Any, bases: Mapping[str, str], *, download: bool) -> Path | None:
    """Refuses a base of another family than the config's, by its name on the hub, then by its files; and one
    that states other networks or another schedule.

    -> the folder of the base's own vocabulary, where it has one on this machine.
    """
    own = _family(module) if config.is_dreambooth else None
    missing = {part: hub for part, hub in run.hub_models(bases).items() if hub.local() is None}
    for part, hub in missing.items():
        found = hub.family()
        if own is not None and found is not None and part == "all":
            _check_same_family(found, own, where=hub)
    if missing and not download:
        return None
    files = run.base_files(config)
    if not isinstance(module, LatentDiffusion):
        return None
    if own is not None and "vae" in files:  # its names and shapes are the same in all families
        node = {"params": {"scale_factor": module.networks["vae"].scale_factor}}
        check_same_scale(open_vae(files["vae"])[1], node, where=files["vae"])
    models = {part: open_model(path) for part, path in files.items() if part != "vae"}
    if own is not None and "all" in models:
        _check_same_family(models["all"].family, own, where=models["all"].path)
    stated = {part: (model.path, model.known) for part, model in models.items()}
    if "vae" in files:
        stated["vae"] = files["vae"], without_scale(open_vae(files["vae"])[1])
    check_agreement(module, config.model["params"], stated)
    return next((model.tokenizer for model in models.values() if model.tokenizer is not None), None)


def _check_same_family(found: Family, own: Family, *, where: object) -> None:
    if found is not own:
        what = f"This is a model of {found.name}, but the config is of {own.name}"
        raise UserError(what, where=where, remedy=f"Use --base {found.config}.")


def _family(module: LatentDiffusion) -> Family:
    return family_of({"unet": module.networks["unet"].state_dict()})


def _check_average(config: RunConfig, module: Any) -> None:
    """Refuses an average or a decay of the rates beside an optimizer that averages the weights itself."""
    if not averages_weights(optimizer_of(module)):
        return
    if config.ema_decay is not None:
        what = "The optimizer averages the weights already, and that is what is evaluated and exported"
        raise UserError(what, where="ema_decay", remedy="Take it off, or set model.params.optimizer=adamw.")
    schedule = getattr(module, "lr_schedule", None)
    if schedule is not None and type(schedule) is not Constant:
        what = "A schedule-free optimizer's average takes the place of a decay of the rates"
        where, remedy = "model.params.lr_schedule", "Set it to constant, or model.params.optimizer=adamw."
        raise UserError(what, where=where, remedy=remedy)


def _check_networks(module: LatentDiffusion) -> None:
    """Refuses networks that do not fit one another."""
    unet, vae, text = (module.networks[name] for name in ("unet", "vae", "text_encoder"))
    pairs = {
        "unet.params.in_channels": (unet.in_channels, vae.embed_dim, "vae.params.embed_dim"),
        "unet.params.out_channels": (unet.out[-1].out_channels, vae.embed_dim, "vae.params.embed_dim"),
        "unet.params.context_dim": (unet.context_dim, text.context_dim, "text_encoder.params.hidden_size"),
    }
    if unet.adm_in_channels is not None or text.pooled_dim is not None:
        vector = None if text.pooled_dim is None else vector_width(text.pooled_dim)
        wanted = "pooled vector of text_encoder, with six numbers"
        pairs["unet.params.adm_in_channels"] = (unet.adm_in_channels, vector, wanted)
    for one in text.encoders:
        if max(one.bos_token_id, one.eos_token_id, one.pad_token_id) >= one.vocab_size:
            what = f"A special token is not among the {one.vocab_size} of the vocabulary"
            where, remedy = "model.params.text_encoder.params", "Set vocab_size, and the ids of the tokens."
            raise UserError(what, where=where, remedy=remedy)
    for key, (own, wanted, other) in pairs.items():
        if own != wanted:
            where, remedy = f"model.params.{key}", "Give them the same number."
            raise UserError(f"{own} is not the {wanted} of {other}", where=where, remedy=remedy)


def _check_learning(module: LatentDiffusion, trainer: TrainerOptions, *, processes: int) -> None:
    """Refuses a module that has no weights to learn, or none after some of the steps."""
    unet, text = (_learns(module.trainable_modules[name]) for name in ("unet", "text_encoder"))
    if not unet and not text and module.trainable.learned_token is None:
        remedy = "Set trainable.unet or trainable.text_encoder to true, or give the LoRA layers to adapt."
        raise UserError("Nothing in the model learns", where="model.params", remedy=remedy)
    until = module.trainable.text_encoder_steps
    if until is not None and processes > 1:
        remedy = "Train with one device, or take it off."
        what = "Several processes need gradients of the text encoder at every step"
        raise UserError(what, where="model.params.trainable.text_encoder_steps", remedy=remedy)
    if not unet and until is not None and until < trainer.max_steps:
        what = f"Nothing learns after step {until}, for the UNet does not"
        remedy = "Take it off, or end the run there with trainer.max_steps."
        raise UserError(what, where="model.params.trainable.text_encoder_steps", remedy=remedy)


def _warn_of_lost_updates(module: LatentDiffusion, trainer: TrainerOptions) -> None:
    """Says that most updates of weights in bfloat16 are lost by an optimizer that rounds to the nearest."""
    if trainer.precision == "bf16-true" and not rounds_stochastically(module.optimizer):
        log.warning(
            "trainer.precision=bf16-true: updates smaller than 1/512 of a bfloat16 weight are lost; "
            "take model.params.optimizer=adamw_bf16, which rounds them right on average, with bf16-mixed"
        )


def _learns(network: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in network.parameters())


def _check_sampling(
    config: RunConfig, nodes: Mapping[str, Node], process: NoiseProcess, *, concepts: Sequence[Concept]
) -> None:
    """Refuses prompts of samples with unknown placeholders, and steps that the schedule does not have."""
    for k, prompt in enumerate(config.samples.prompts):
        try:
            filled_for([prompt], concepts)
        except UserError as error:
            raise UserError(error.what, where=f"samples.prompts.{k}", remedy=error.remedy) from error
    asked = {
        section: {name: getattr(getattr(config, section), name) for name in SAMPLING}
        for section in ("priors", "samples")
    }
    asked |= {
        f"{key}.params": {name: param_of(node, name) for name in SAMPLING if takes(node, name)}
        for key, node in nodes.items()
        if takes(node, "steps")
    }
    for key, how in asked.items():
        _check_levels(process, key, **how)


def _check_drawn(pipeline: Text2Image, sampling: Mapping[str, Any], *, where: str) -> None:
    """Refuses a size of samples that the networks cannot halve."""
    try:
        pipeline.latent_shape(sampling.get("height"), sampling.get("width"))
    except UserError as error:
        raise UserError(error.what, where=where, remedy=error.remedy) from error


def _check_levels(
    process: NoiseProcess,
    key: str,
    *,
    steps: int,
    sampler: SamplerNode = "ddim",
    spacing: Spacing | None = None,
) -> None:
    """Refuses steps of a sampling that the schedule does not have. key: of its section."""
    timesteps = len(process.alphas_cumprod)
    if steps > timesteps:
        what = f"{steps} sampling steps are more than the schedule's {timesteps} timesteps"
        raise UserError(what, where=f"{key}.steps", remedy=f"Choose from 1 to {timesteps}.")
    try:
        sampling_levels(process, sampler, steps=steps, spacing=spacing)
    except UserError as error:
        raise UserError(error.what, where=f"{key}.spacing", remedy=error.remedy) from error


def _check_logger(config: RunConfig) -> None:
    package = LOGGERS.get(config.logger["target"].rpartition(".")[2]) if config.logger else None
    if package and importlib.util.find_spec(package) is None:
        remedy = f"Install it with `pip install {package}`, or take `logger` off."
        raise UserError(f"The logger needs {package}, which is not installed", where="logger", remedy=remedy)


def _check_other_run(config: RunConfig) -> None:
    """Refuses sections of DreamBooth in another training, which would not use them."""
    for key in ("priors", "samples", "evaluation", "evaluate_also", "online_eval"):
        if config.container.get(key):
            what = f"`{key}` is of DreamBooth's runs, and this data is not of photos"
            raise UserError(what, where=key, remedy="Take it off.")
