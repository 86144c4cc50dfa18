"""The parts of a run: base weights, training with resume, model file and samples."""

import hashlib
import json
import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import TensorBoardLogger

from ldm.checkpoints.hub import HubModel, local_path
from ldm.checkpoints.infer_config import model_config
from ldm.checkpoints.known import flat
from ldm.checkpoints.load import load_state_dicts, open_model
from ldm.checkpoints.modelspec import file_metadata
from ldm.checkpoints.save import DTYPES
from ldm.checkpoints.tensors import unpickle
from ldm.checkpoints.vae import open_vae
from ldm.config import instantiate
from ldm.contact_sheet import contact_sheet, save_image
from ldm.engine import distributed
from ldm.engine.averaging import averaging
from ldm.engine.checkpoints import AtomicCheckpointIO, CheckpointCallback
from ldm.engine.device import peak_memory_mib
from ldm.engine.gradients import FreeGradients
from ldm.engine.non_finite import NonFiniteGuard
from ldm.engine.peak import reset_peak_memory
from ldm.engine.resume import check_fit, latest_valid_checkpoint, name_of
from ldm.engine.sharding import fsdp_replica
from ldm.engine.signals import StopSignals
from ldm.engine.step_log import StepOfLogs
from ldm.errors import UserError
from ldm.files import atomic_write, make_folder, parse_json
from ldm.optim.optimizer_nodes import averages_weights, optimizer_of
from ldm.runs.disk import require_checkpoint_space
from ldm.runs.inputs import base_hash
from ldm.runs.online_eval import OnlineEvalCallback
from ldm.schema import FitConfig, RunConfig
from ldm.shipped import find_file

log = logging.getLogger(__name__)

EXAMPLE = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # of a base on the hub


def base_names(config: RunConfig) -> dict[str, str]:
    """Network -> the path or hub id of its base weights; "all" is `base_checkpoint`, of all other networks.

    Raises UserError for a path that is missing. Nothing is downloaded.
    """
    named = {"all": config.base_checkpoint, **(config.base_parts or {})}
    names = {part: name for part, name in named.items() if name}
    for name in names.values():
        path = find_file(name)
        if HubModel.of(path) is None and not path.exists():
            remedy = f"Name a file, a folder or a hub id, as with --actual_resume {EXAMPLE}."
            raise UserError("There is no base checkpoint", where=path, remedy=remedy)
    return names


def hub_models(bases: Mapping[str, str]) -> dict[str, HubModel]:
    """Those of `base_names` that are named by their hub ids."""
    found = {part: HubModel.of(find_file(name)) for part, name in bases.items()}
    return {part: hub for part, hub in found.items() if hub is not None}


def base_files(config: RunConfig) -> dict[str, Path]:
    """`base_names` on this machine: what is named by a hub id is downloaded, unless it is here."""
    return {part: local_path(find_file(name)) for part, name in base_names(config).items()}


def check_parts(parts: Collection[str], networks: Collection[str]) -> None:
    """Raises UserError for base weights of a network that the module does not have."""
    for part in parts:
        if part not in ("all", *networks):
            remedy = f"Choose {', '.join(networks)}." if networks else "Take it off."
            raise UserError(f"`{part}` is not a network", where="base_parts", remedy=remedy)


def load_base(
    networks: Mapping[str, torch.nn.Module],
    files: Mapping[str, Path],
    *,
    parameterization: str | None = None,
) -> str:
    """Loads networks from base models, by `base_files` -> the sha256 of these.

    A folder's own tokenizer is used, unless the config names one on this machine. Given a
    `parameterization`, a UNet that predicts something else is refused.
    """
    check_parts(files, networks)
    for part, path in files.items():
        names = [name for name in networks if name not in files] if part == "all" else [part]
        if part == "vae":
            load_state_dicts({part: networks[part]}, {part: open_vae(path)[0]}, where=path)
            continue
        model = open_model(path)
        if model.learned_tokens:
            what = f"The learned word {', '.join(model.learned_tokens)} of this checkpoint would be lost"
            raise UserError(what, where=path, remedy="Continue that run: --resume RUN.")
        if parameterization is not None and "unet" in names:
            model.require_prediction(parameterization)
        found = {name: model.state_dicts.get(name, {}) for name in names}
        load_state_dicts({name: networks[name] for name in names}, found, where=model.path)
        if "text_encoder" in networks:
            use_vocabulary(networks["text_encoder"], model.tokenizer)
    if list(files) == ["all"]:
        return base_hash(files["all"])
    hashes = "".join(f"{part}:{base_hash(path)};" for part, path in files.items())
    return hashlib.sha256(hashes.encode()).hexdigest()


def use_vocabulary(text_encoder: Any, folder: Path | None) -> None:
    """Reads prompts by a base's own tokenizer, unless the config names one on this machine."""
    if folder is not None and not find_file(text_encoder.tokenizer_name).is_dir():
        text_encoder.tokenizer_name = str(folder)


def fit(
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    config: FitConfig,
    *,
    folder: Path,
    callbacks: Sequence[pl.Callback],
    online_eval: OnlineEvalCallback | None = None,
) -> None:
    """Trains to `max_steps`, from the run's newest whole checkpoint where it has one.

    SIGTERM, SIGINT and SIGUSR1 save and raise `Stopped`.
    """
    place, kept = module.device, folder / "checkpoints"
    last = distributed.on_rank0_broadcast(lambda: latest_valid_checkpoint(kept))
    data.start_step = resume_from(module, last, max_steps=config.trainer.max_steps) if last else 0
    if data.start_step == config.trainer.max_steps:
        return
    evaluate_every, keep = online_eval.config.every_steps if online_eval else 0, config.checkpoints_kept
    require_checkpoint_space(config, module, run=folder, evaluate_every=evaluate_every)
    with StopSignals() as stop, fsdp_replica(module, config.trainer) as (learner, trainer):
        core = _core_callbacks(kept, stop, online_eval, every=config.checkpoint_every, keep=keep)
        by_optimizer = averages_weights(optimizer_of(module))
        about = {"device": config.ema_device, "every": config.ema_every, "by_optimizer": by_optimizer}
        average = averaging(config.ema_decay, **about)
        logger = config.logger
        pl.Trainer(
            default_root_dir=folder,
            logger=instantiate(logger) if logger else tensorboard_logger(folder, start=data.start_step),
            callbacks=[FreeGradients(), StepOfLogs(), *average, *callbacks, *core],
            plugins=[AtomicCheckpointIO()],
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_model_summary=False,
            **{**trainer, "enable_progress_bar": False},  # callbacks has ours
        ).fit(learner, data, ckpt_path=last)
    module.to(place)  # the Trainer moves it to the CPU


def _core_callbacks(
    folder: Path, stop: StopSignals, online_eval: OnlineEvalCallback | None, *, every: int, keep: int
) -> list[pl.Callback]:
    """Online evaluation, logging, the non-finite guard, checkpoints: in this order."""
    guard = NonFiniteGuard()
    saves = CheckpointCallback(
        folder, every=every, keep=keep, stop=stop, guard=guard, online_eval=online_eval
    )
    return [*([online_eval] if online_eval else []), LearningRateMonitor(), guard, saves]


def load_eval_history(folder: Path) -> list[dict[str, float]]:
    """The rows of `OnlineEvalCallback` in a run's newest checkpoint; none without online evaluation."""
    newest = latest_valid_checkpoint(folder / "checkpoints")
    states = unpickle(newest, mapped=True)["callbacks"] if newest else {}
    return states.get("OnlineEvalCallback", {}).get("rows", [])


def load_best_weights(module: pl.LightningModule, folder: Path, step: int) -> None:
    """Loads the weights of the checkpoint of a step into the module."""
    path = folder / "checkpoints" / name_of(step)
    if not path.exists():
        remedy = "Export the last weights: export.weights=last."
        raise UserError("The best checkpoint is missing", where=path, remedy=remedy)
    state = unpickle(path, mapped=True)
    module.load_state_dict(state["state_dict"])
    module.on_load_checkpoint(state)


def resume_from(module: pl.LightningModule, checkpoint: Path, *, max_steps: int) -> int:
    """Optimizer steps of a checkpoint; if they are all steps of the run, its weights are loaded."""
    state = unpickle(checkpoint, mapped=True)
    check_fit(state, module, where=checkpoint)
    step = state["global_step"]
    log.info("Resumed at step %d: %s", step, checkpoint)
    if max_steps < step:
        remedy = f"Set trainer.max_steps to {step} or more."
        raise UserError(f"The run has done {step} steps already", where=checkpoint, remedy=remedy)
    if step == max_steps:
        module.load_state_dict(state["state_dict"])  # the average, if there is one
        module.on_load_checkpoint(state)
    return step


def tensorboard_logger(folder: Path, *, start: int) -> TensorBoardLogger:
    """TensorBoard's files; steps from `start` on that an earlier process logged are purged."""
    return TensorBoardLogger(folder, name="", version="tensorboard", purge_step=start)


def export(
    module: Any,
    config: RunConfig,
    folder: Path,
    *,
    size: int,
    trigger_phrase: str | None = None,
    base_hash: str = "",
) -> Path:
    """Writes the model file; its metadata has the networks' config, image size and training config.

    size: pixels a side. trigger_phrase: what names the run's subject in prompts.
    """
    path, params = folder / "model.safetensors", flat(config.model.get("params") or {})
    state_dicts = {name: network.state_dict() for name, network in getattr(module, "networks", {}).items()}
    if "unet" in state_dicts:
        about = file_metadata(
            model_config(state_dicts, params),
            title=folder.name,
            size=size,
            trigger_phrase=trigger_phrase,
            base_sha256=base_hash or None,
            training=config.container,
        )
    else:
        networks = {name: params[name] for name in ("unet", "vae", "text_encoder") if name in params}
        about = {"ldm.config": json.dumps(networks), "ldm.size": str(size)}
    return module.export(path, dtype=DTYPES[config.export.dtype], metadata=about)


SampleGrid = Sequence[tuple[str, Sequence[Image.Image]]]


def save_image_grid(folder: Path, rows: SampleGrid, settings: Mapping[str, Any]) -> None:
    """Writes every image as a PNG, with the settings in its metadata: 00-00.png is row 0, image 0.

    The seed of the settings is that of image 0; each has its own, one more than the last.
    """
    make_folder(folder)
    for k, (prompt, images) in enumerate(rows):
        for i, image in enumerate(images):
            save_image(folder / f"{k:02d}-{i:02d}.png", image, _settings_of(image, prompt, settings, i))


def load_image_grid(
    folder: Path, prompts: Sequence[str], n: int, settings: Mapping[str, Any]
) -> SampleGrid | None:
    """`n` images of each prompt that `save_image_grid` left; None unless all are there, with `settings`."""
    rows = []
    for k, prompt in enumerate(prompts):
        images = [_read_image(folder, k, i, prompt, settings) for i in range(n)]
        rows.append((prompt, [image for image in images if image is not None]))
    return rows if all(len(images) == n for _, images in rows) else None


def _read_image(
    folder: Path, row: int, i: int, prompt: str, settings: Mapping[str, Any]
) -> Image.Image | None:
    try:
        with Image.open(folder / f"{row:02d}-{i:02d}.png") as file:
            same = parse_json(file.text["dreambooth"]) == _settings_of(file, prompt, settings, i)
            return file.convert("RGB") if same else None
    except (OSError, KeyError, ValueError):
        return None


def _settings_of(image: Image.Image, prompt: str, settings: Mapping[str, Any], i: int) -> dict[str, Any]:
    """What the PNG of image i says of its sampling; its sides where the settings have none."""
    sides = {"height": image.height, "width": image.width}
    return {"prompt": prompt, **sides, **settings, "seed": settings["seed"] + i}


def save_samples(folder: Path, before: SampleGrid, after: SampleGrid, settings: Mapping[str, Any]) -> Path:
    """Writes every sample, as `save_image_grid` does, and a contact sheet of before and after -> its path."""
    save_image_grid(folder, after, settings)
    rows = []
    for (prompt, old), (_, new) in zip(before, after, strict=True):
        rows += [(f"before: {prompt}", old), (f"after: {prompt}", new)]
    return save_image(folder / "contact_sheet.png", contact_sheet(rows), {"prompts": [p for p, _ in after]})


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


class PhaseTimer:
    """Seconds and peak memory (MiB) of each phase of a run: `with timer("training"): ...`.

    Resident memory of a CPU includes freed memory of earlier phases that the C library keeps; where its peak
    cannot be reset, `peak_mib` stays empty.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_mib: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        was_reset = reset_peak_memory()
        start = time.perf_counter()
        yield
        self.seconds[phase] = round(time.perf_counter() - start, 2)
        if was_reset:
            self.peak_mib[phase] = round(peak_memory_mib(), 1)
