"""Everything that a config is refused for before its run begins: nothing is written, no weights are read.

Names, types and ranges are checked by `RunConfig.parse` already; here is what concerns several keys, files,
packages and devices. What each part of a run can and cannot do is said where that part is.
"""

import importlib.util

import torch
from torch import nn

from ldm.config import instantiate, param_of, takes
from ldm.data.dreambooth import DreamBoothDataModule
from ldm.data.prompts import fill
from ldm.errors import UserError
from ldm.training import distributed, run
from ldm.training.before_after import evaluation_nodes
from ldm.training.folder import check_name
from ldm.training.latent_diffusion import LatentDiffusion
from ldm.training.online_eval import check_online_eval
from ldm.training.sampling import text2image
from ldm.training.schema import RunConfig, TrainerOptions
from ldm.training.sharding import check_sharding
from ldm.training.storybook_base import StorybookBase

LOGGERS = {  # class of a logger -> the package that it needs
    "WandbLogger": "wandb",
    "CometLogger": "comet_ml",
    "MLFlowLogger": "mlflow",
    "NeptuneLogger": "neptune",
}
NETWORKS = {"unet", "vae", "text_encoder"}


def validate(config: RunConfig) -> None:
    """Raises UserError for a config whose run cannot end well on this machine."""
    check_name(config.name)
    distributed.check_devices(config.trainer)
    check_sharding(config)
    check_online_eval(config)
    _check_logger(config)
    files = run.base_files(config)
    nodes = evaluation_nodes(config)
    with torch.device("meta"):
        module = instantiate(config.model)
    data = instantiate(config.data)
    run.check_parts(files, getattr(module, "networks", {}))
    if isinstance(module, LatentDiffusion):
        module.check(config.trainer, processes=distributed.process_count(config.trainer))
        _check_learning(module, config.trainer)
    if not isinstance(data, DreamBoothDataModule):
        _check_other_run(config)
        return
    if not isinstance(module, LatentDiffusion) or isinstance(module, StorybookBase):
        remedy = "Set model.target=ldm.training.latent_diffusion.LatentDiffusion."
        raise UserError("This model does not learn from photos", where="model.target", remedy=remedy)
    if "all" not in files and not files.keys() >= NETWORKS:
        remedy = "Name one with --actual_resume FILE."
        raise UserError("DreamBooth needs a base to train on", where="base_checkpoint", remedy=remedy)
    text2image(module, size=data.size).latent_shape()
    data.check()
    check_prior_target(module, data)
    _check_sampling(config, module, data)
    for node in nodes.values():
        instantiate(node)


def check_prior_target(module: LatentDiffusion, data: DreamBoothDataModule) -> None:
    """Refuses empty captions on the subject's photos without a teacher: they would train the subject."""
    if data.priors_show_subject and module.prior_target != "teacher":
        what = "Without prior images, the empty prompt needs the teacher's prediction as its target"
        remedy = "Set model.params.prior_target=teacher, or raise data.params.num_priors."
        raise UserError(what, where="prior_caption_dropout", remedy=remedy)


def _check_learning(module: LatentDiffusion, trainer: TrainerOptions) -> None:
    """Refuses a module that has no weights to learn, or none after some of the steps."""
    unet, text = (_learns(module.trainable_modules[name]) for name in ("unet", "text_encoder"))
    if not unet and not text and module.learned_token is None:
        remedy = "Set train_unet or train_text_encoder to true, or give the LoRA layers to adapt."
        raise UserError("Nothing in the model learns", where="model.params", remedy=remedy)
    until = module.text_encoder_steps
    if not unet and until is not None and until < trainer.max_steps:
        what = f"Nothing learns after step {until}, for the UNet does not"
        remedy = "Take it off, or end the run there with trainer.max_steps."
        raise UserError(what, where="model.params.text_encoder_steps", remedy=remedy)


def _learns(network: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in network.parameters())


def _check_sampling(config: RunConfig, module: LatentDiffusion, data: DreamBoothDataModule) -> None:
    """Prompts of samples, and numbers of sampling steps."""
    for k, prompt in enumerate(config.samples.prompts):
        try:
            fill(prompt, **data.words)
        except UserError as error:
            raise UserError(error.what, where=f"samples.prompts.{k}", remedy=error.remedy) from error
    steps = {"priors.steps": config.priors.steps, "samples.steps": config.samples.steps}
    for key, node in evaluation_nodes(config).items():
        if takes(node, "steps"):
            steps[f"{key}.params.steps"] = param_of(node, "steps")
    longest = len(module.alphas_cumprod)
    for key, count in steps.items():
        if count > longest:
            what = f"{count} sampling steps are more than the schedule's {longest} timesteps"
            raise UserError(what, where=key, remedy=f"Choose from 1 to {longest}.")


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
