"""The job of a config: validation, training, and the paths of the results."""

import logging
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf

from ldm.checkpoints.hub import describe
from ldm.config import instantiate, param_of, save_config
from ldm.data.dreambooth import DreamBoothDataModule
from ldm.engine import distributed
from ldm.engine.device import device_of, keep_freed_memory, set_matmul_precision
from ldm.model_file import use_device
from ldm.runs import run
from ldm.runs.before_after import evaluation_nodes
from ldm.runs.buckets import bucket_lines
from ldm.runs.callbacks import ThroughputLogger
from ldm.runs.console import TrainingBar
from ldm.runs.dreambooth import DreamBoothRun
from ldm.runs.folder import LOGS, claimed, folder_to_resume, new_folder
from ldm.runs.inputs import keep_inputs
from ldm.runs.limits import limits_of
from ldm.runs.memory import encoding, estimate, report
from ldm.runs.online_eval import Watch
from ldm.runs.recompute import with_checkpointing_chosen
from ldm.runs.validate import validate
from ldm.schema import RunConfig
from ldm.training.latent_diffusion import LatentDiffusion

log = logging.getLogger(__name__)


def run_job(
    config: RunConfig,
    resume: str | None = None,
    *,
    allow_config_change: bool = False,
    watch: Watch | None = None,
) -> list[Path]:
    """Runs the job of a config, or continues the one in `resume` -> the paths of its results.

    "auto" continues the newest unfinished run of the config's name, if there is one. watch: sees each row of
    online evaluation, and what it raises ends the run, unfinished.
    """
    config = replace(config, trainer=distributed.join(config.trainer))

    def find() -> Path | None:
        return folder_to_resume(config.container, resume, allow_config_change=allow_config_change)

    resumed = distributed.on_rank0_broadcast(find)
    data = validate(config, run_folder=resumed)
    if resume == "auto":  # another process may have taken it meanwhile
        resumed = distributed.on_rank0_broadcast(find)
    use_device(device_of(config.trainer))
    if config.is_dreambooth:
        config = with_checkpointing_chosen(config, device_of(config.trainer))
    pl.seed_everything(config.seed, verbose=False)
    keep_freed_memory()
    set_matmul_precision(config.matmul_precision)
    folder = resumed or distributed.on_rank0_broadcast(lambda: new_folder(LOGS / config.name))
    with claimed(folder) if distributed.rank() == 0 else nullcontext():
        if distributed.rank() == 0:
            save_config(config.source, folder / "config.yaml")
        return _train(config, data, folder, allow_change=allow_config_change, watch=watch)


def _train(
    config: RunConfig,
    data: pl.LightningDataModule,
    folder: Path,
    *,
    allow_change: bool,
    watch: Watch | None,
) -> list[Path]:
    """Loads the base, trains, exports -> the paths that rank 0 writes. data: of `validate`."""
    module = instantiate(config.model)
    files, base_hash = run.base_files(config), ""
    evaluations = evaluation_nodes(config).values()
    keep_inputs(folder, data, files, evaluations=evaluations, allow_change=allow_change)
    if files:
        predicts = module.process.parameterization if isinstance(module, LatentDiffusion) else None
        base_hash = run.load_base(module.networks, files, parameterization=predicts)
        module.to(device_of(config.trainer))
        if isinstance(module, LatentDiffusion):
            module.add_learned_token()
            data.attach(encode=module.encode_images, vae_hash=base_hash)
    if isinstance(data, DreamBoothDataModule):
        if distributed.rank() == 0 and (lines := bucket_lines(data)):
            log.info(lines.rstrip())
        return DreamBoothRun(module, data, config, folder, base_hash=base_hash, watch=watch)()
    bars = [TrainingBar()] if config.trainer.enable_progress_bar else []
    run.fit(module, data, config, folder=folder, callbacks=[ThroughputLogger(), *bars])
    return [] if distributed.rank() else [run.export(module, config, folder, size=data.size)]


def plan(config: RunConfig) -> str:
    """The resolved config, and for DreamBooth an estimate of memory and disk; refuses what a run refuses."""
    data = validate(config, download=False)
    text = OmegaConf.to_yaml(config.source, resolve=True)
    if config.is_dreambooth:
        with torch.device("meta"):
            reader = instantiate(config.model).cond_stage_model
        limits_of(config, reader, data)
        device = device_of(config.trainer)
        chosen = with_checkpointing_chosen(config, device)
        if chosen != config:
            params = chosen.model["params"]["unet"]["params"]
            text += (
                f"use_checkpoint, by the free memory of {device}: {str(params['use_checkpoint']).lower()}\n"
            )
        if param_of(config.data, "buckets") is not None:
            text += bucket_lines(data)
        caches = param_of(config.data, "cache_latents")
        text += "".join(
            f"to be downloaded for {hub}: {describe(hub.wanted())}\n"
            for hub in run.hub_models(run.base_names(config)).values()
            if hub.local() is None
        )
        text += report(*estimate(chosen), encoding=encoding(config) if caches else 0)
    return text
