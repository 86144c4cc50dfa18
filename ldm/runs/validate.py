"""Everything that a config is refused for before its run begins: nothing is written, no weights are read.

Names, types and ranges are checked by `RunConfig.parse` already; here is what concerns several keys, files,
packages and devices. What each part of a run can and cannot do is said where that part is.
"""

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.annotations import Node
from ldm.checkpoints.load import open_model
from ldm.checkpoints.vae import check_same_scale, open_vae
from ldm.config import instantiate, param_of
from ldm.data.concepts import Concept, filled_for
from ldm.data.dreambooth import DreamBoothDataModule
from ldm.engine import distributed
from ldm.engine.sharding import check_sharding
from ldm.errors import UserError
from ldm.families.known import family_of
from ldm.families.sdxl.conditioning import vector_width
from ldm.families.sdxl.family import SDXL
from ldm.files import require_space
from ldm.runs import run
from ldm.runs.before_after import evaluation_nodes
from ldm.runs.folder import check_name
from ldm.runs.memory import checkpoint_bytes
from ldm.runs.online_eval import check_online_eval
from ldm.runs.sampling import text2image
from ldm.schema import RunConfig, TrainerOptions
from ldm.storybook.training.base import StorybookBase
from ldm.training.latent_diffusion import LatentDiffusion

log = logging.getLogger(__name__)
LEAST_SDXL = 512  # pixels a side
LOGGERS = {  # class of a logger -> the package that it needs
    "WandbLogger": "wandb",
    "CometLogger": "comet_ml",
    "MLFlowLogger": "mlflow",
    "NeptuneLogger": "neptune",
}


def validate(config: RunConfig) -> None:
    """Raises UserError for a config whose run cannot end well on this machine."""
    check_name(config.name)
    distributed.check_devices(config.trainer)
    check_sharding(config)
    check_online_eval(config)
    _check_logger(config)
    files = run.base_files(config)
    with torch.device("meta"):
        module = instantiate(config.model)
    run.check_parts(files, getattr(module, "networks", {}))
    if isinstance(module, LatentDiffusion):
        processes = distributed.process_count(config.trainer)
        module.check(config.trainer, processes=processes)
        _check_learning(module, config.trainer, processes=processes)
        _check_networks(module)
    if config.is_dreambooth:
        _check_dreambooth(config, module, files)
    else:
        instantiate(config.data)
        _check_other_run(config)
    needed = (config.checkpoints_kept + 1) * checkpoint_bytes(module, averaged=config.ema_decay is not None)
    require_space(Path(), needed, what="a run's checkpoints")


def _check_dreambooth(config: RunConfig, module: Any, files: Mapping[str, Path]) -> None:
    """Refuses a DreamBooth run by its photos, prompts, base and evaluations."""
    data: DreamBoothDataModule = instantiate(config.data)
    if not isinstance(module, LatentDiffusion) or isinstance(module, StorybookBase):
        remedy = "Set model.target=ldm.training.latent_diffusion.LatentDiffusion."
        raise UserError("This model does not learn from photos", where="model.target", remedy=remedy)
    if "all" not in files and not files.keys() >= module.networks.keys():
        remedy = "Name one with --actual_resume FILE."
        raise UserError("DreamBooth needs a base to train on", where="base_checkpoint", remedy=remedy)
    if not any(_rates(module)):
        remedy = "Raise model.params.trainable.learning_rate."
        raise UserError(
            "Every learning rate is 0", where="model.params.trainable.learning_rate", remedy=remedy
        )
    text2image(module, size=data.size).latent_shape()  # refuses a size that the networks cannot halve
    _check_family(module, files, size=data.size)
    data.check()
    check_prior_target(module, data)
    _check_learned_token(module, data)
    nodes = evaluation_nodes(config)
    _check_sampling(config, nodes, timesteps=len(module.process.alphas_cumprod), concepts=data.concepts)
    if config.samples.spacing is not None:
        module.process.levels(
            config.samples.steps, config.samples.spacing
        )  # refuses what the schedule has not
    for node in nodes.values():
        instantiate(node)  # reads its own networks and prompts


def _check_family(module: LatentDiffusion, files: Mapping[str, Path], *, size: int) -> None:
    """Refuses a base of another family than the config's; warns of sizes at which SDXL draws badly."""
    own = family_of({"unet": module.networks["unet"].state_dict()})
    if own is SDXL and "vae" in files:  # its names and shapes are those of SD's
        node = {"params": {"scale_factor": module.networks["vae"].scale_factor}}
        check_same_scale(open_vae(files["vae"])[1], node, where=files["vae"])
    if own is SDXL and size < LEAST_SDXL:
        log.warning("data.params.size %d: SDXL draws badly below %d pixels", size, LEAST_SDXL)
    try:
        base = open_model(files["all"]) if "all" in files else None
    except UserError:  # which loading says again, with the rest of what is wrong
        return
    if base is not None and base.family is not own:
        what = f"This is a model of {base.family.name}, but the config is of {own.name}"
        raise UserError(what, where=base.path, remedy=f"Use --base {base.family.config}.")


def check_prior_target(module: LatentDiffusion, data: DreamBoothDataModule) -> None:
    """Refuses empty captions on the subject's photos without a teacher: they would train the subject."""
    if data.priors_show_subject and module.objective.streams["prior"].target != "teacher":
        what = "Without prior images, the empty prompt needs the teacher's prediction as its target"
        remedy = "Set model.params.objective.prior_target=teacher, or raise data.params.num_priors."
        raise UserError(what, where="prior_caption_dropout", remedy=remedy)


def _check_learned_token(module: LatentDiffusion, data: DreamBoothDataModule) -> None:
    """Refuses textual inversion of several concepts: there is one new word."""
    if module.trainable.learned_token is not None and len(data.concepts) > 1:
        what = f"One new word cannot name the {len(data.concepts)} concepts of this run"
        remedy = "Take it off, or train them one at a time."
        raise UserError(what, where="model.params.trainable.learned_token", remedy=remedy)


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


def _rates(module: LatentDiffusion) -> list[float]:
    """Learning rates of what learns."""
    groups = module.trainable.param_groups(module.networks)
    rates = [rate for part, rate in groups.values() if _learns(part)]
    new = module.trainable.learned_token  # its embeddings come with the base's weights
    return rates if new is None else [*rates, new.learning_rate]


def _learns(network: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in network.parameters())


def _check_sampling(
    config: RunConfig, nodes: Mapping[str, Node], *, timesteps: int, concepts: Sequence[Concept]
) -> None:
    """Refuses prompts of samples with unknown placeholders, and more sampling steps than timesteps."""
    for k, prompt in enumerate(config.samples.prompts):
        try:
            filled_for([prompt], concepts)
        except UserError as error:
            raise UserError(error.what, where=f"samples.prompts.{k}", remedy=error.remedy) from error
    steps = {"priors.steps": config.priors.steps, "samples.steps": config.samples.steps}
    steps |= {f"{key}.params.steps": param_of(node, "steps") for key, node in nodes.items()}
    for key, count in steps.items():
        if count > timesteps:
            what = f"{count} sampling steps are more than the schedule's {timesteps} timesteps"
            raise UserError(what, where=key, remedy=f"Choose from 1 to {timesteps}.")


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
