"""The job of a config: checks, training, and the paths of the results."""

from contextlib import nullcontext
from pathlib import Path

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from ldm.config import instantiate, save_config, to_plain
from ldm.data.dreambooth import DreamBoothDataModule
from ldm.training import distributed, run
from ldm.training.before_after import check_evaluations
from ldm.training.callbacks import ThroughputLogger
from ldm.training.checkpoints import check_saving
from ldm.training.device import device_of, keep_freed_memory, set_matmul_precision
from ldm.training.dreambooth import DreamBoothRun, check_prior_target
from ldm.training.folder import claimed, folder_of
from ldm.training.inputs import keep_inputs
from ldm.training.latent_diffusion import LatentDiffusion
from ldm.training.memory import encoding, estimate, report
from ldm.training.online_eval import check_online_eval
from ldm.training.recompute import with_checkpointing_chosen
from ldm.training.sharding import check_sharding


def run_job(
    config: DictConfig, resume: str | None = None, *, allow_config_change: bool = False
) -> list[Path]:
    """Runs the job of a config, or continues the one in `resume` -> the paths of its results.

    "auto" continues the newest unfinished run of the config's name, if there is one.
    """
    plain = to_plain(config)
    plain["trainer"] = distributed.join(plain["trainer"])
    data = instantiate(plain["data"])
    if isinstance(data, DreamBoothDataModule):
        data.check()
        plain = with_checkpointing_chosen(plain, device_of(plain["trainer"]))
    run.base_files(plain)
    check_saving(plain)
    check_evaluations(plain)
    check_online_eval(plain)
    check_sharding(plain)
    pl.seed_everything(plain["seed"], verbose=False)
    keep_freed_memory()
    set_matmul_precision(plain.get("matmul_precision", "high"))
    module = instantiate(plain["model"])
    if isinstance(module, LatentDiffusion):
        module.check(plain["trainer"])
        if isinstance(data, DreamBoothDataModule):
            check_prior_target(module, data)
    folder = distributed.on_rank0_broadcast(
        lambda: folder_of(to_plain(config), resume, allow_config_change=allow_config_change)
    )
    with claimed(folder) if distributed.rank() == 0 else nullcontext():
        keep_inputs(folder, data, run.base_files(plain), allow_change=allow_config_change)
        if distributed.rank() == 0:
            save_config(config, folder / "config.yaml")
        return _train(module, data, plain, folder)


def _train(module: pl.LightningModule, data: pl.LightningDataModule, plain: dict, folder: Path) -> list[Path]:
    """Loads the base, trains, exports -> the paths that rank 0 writes."""
    files, base_hash = run.base_files(plain), ""
    if files:
        predicts = getattr(module, "parameterization", None)
        base_hash = run.load_base(module.networks, files, parameterization=predicts)
        module.to(device_of(plain["trainer"]))
        if isinstance(module, LatentDiffusion):
            module.add_learned_token()
            data.attach(encode=module.encode_images, vae_hash=base_hash)
    if isinstance(data, DreamBoothDataModule):
        return DreamBoothRun(module, data, plain, folder, base_hash=base_hash)()
    run.fit(module, data, folder=folder, callbacks=[ThroughputLogger()], **run.training_options(plain))
    return [] if distributed.rank() else [run.export_of(module, plain, folder)]


def plan(config: DictConfig) -> str:
    """The resolved config, and for DreamBooth an estimate of memory and disk."""
    text = OmegaConf.to_yaml(config, resolve=True)
    if config.data.target == "ldm.data.dreambooth.DreamBoothDataModule":
        plain = to_plain(config)
        device = device_of(plain["trainer"])
        chosen = with_checkpointing_chosen(plain, device)
        if chosen != plain:
            params = chosen["model"]["params"]["unet"]["params"]
            text += (
                f"use_checkpoint, by the free memory of {device}: {str(params['use_checkpoint']).lower()}\n"
            )
        caches = plain["data"]["params"].get("cache_latents", True)
        text += report(*estimate(chosen), encoding=encoding(plain) if caches else 0)
    return text
