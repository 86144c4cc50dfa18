"""One run: its folder, its base weights, training with resume, the model file and the pictures it leaves."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger

from ldm.checkpoints.load import file_hash, load_parts, open_model
from ldm.checkpoints.save import DTYPES
from ldm.config import instantiate
from ldm.contact_sheet import contact_sheet, save_picture
from ldm.errors import UserError
from ldm.files import atomic_write

NETWORK_KEYS = (  # of the model's params: what a model file says about itself
    *(f"{part}_config" for part in ("unet", "first_stage", "cond_stage")),
    *("parameterization", "beta_schedule", "linear_start", "linear_end", "timesteps"),
)


@dataclass(frozen=True)
class Export:
    """The model file of a run: precision of its weights."""

    dtype: str = "fp16"


def new_folder(wanted: Path) -> Path:
    """Makes `wanted`, or the first of `wanted-2`, `wanted-3`, ... that no earlier run took."""
    for number in range(1, 10_000):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise UserError("There are too many runs of this name", where=wanted, remedy="Choose another `name`.")


def load_base(networks: Mapping[str, torch.nn.Module], checkpoint: str, parts: Sequence[str] | None) -> str:
    """Loads the named parts (all of them by default) of a base model, file or folder -> its sha256.

    A folder's own vocabulary is used, unless the config names one on this machine.
    """
    names = list(networks) if parts is None else parts
    unknown = [name for name in names if name not in networks]
    if unknown:
        raise UserError(
            f"`{unknown[0]}` is not a network", where="base_parts", remedy=f"Choose {', '.join(networks)}."
        )
    model = open_model(find_file(checkpoint))
    found = {name: model.parts.get(name, {}) for name in names}
    load_parts({name: networks[name] for name in names}, found, where=model.path)
    text = networks.get("cond_stage")
    if text is not None and model.tokenizer is not None and not find_file(text.tokenizer_name).is_dir():
        text.tokenizer_name = str(model.tokenizer)
    return file_hash(model.path)


def find_file(name: str) -> Path:
    """A path as given or, if nothing is there, relative to the repository."""
    given, shipped = Path(name), Path(__file__).resolve().parents[2] / name
    return shipped if not given.exists() and shipped.exists() else given


def fit(
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    *,
    trainer: Mapping[str, Any],
    folder: Path,
    callbacks: Sequence[pl.Callback],
    logger: Mapping[str, Any] | None = None,
    ema_decay: float | None = None,
    checkpoint_every: int = 250,
) -> None:
    """Trains to `max_steps`, from the run's last checkpoint where it has one."""
    checkpoints = folder / "checkpoints"
    extra: list[pl.Callback] = [
        ModelCheckpoint(checkpoints, every_n_train_steps=checkpoint_every, save_last=True, save_top_k=1)
    ]
    if ema_decay is not None:
        extra.append(EMAWeightAveraging(decay=ema_decay))
    last = checkpoints / "last.ckpt"
    if last.exists():
        data.start_step = torch.load(last, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    pl.Trainer(
        default_root_dir=folder,
        logger=instantiate(logger) if logger else TensorBoardLogger(folder, name="", version="tensorboard"),
        callbacks=[*callbacks, *extra],
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        **trainer,
    ).fit(module, data, ckpt_path=last if last.exists() else None)


def export(module: Any, path: Path, *, params: Mapping[str, Any], size: int | None, dtype: str) -> Path:
    """Writes the model file, which says which networks it holds and which size they draw."""
    about = {"ldm.config": json.dumps({key: params[key] for key in NETWORK_KEYS if key in params})}
    if size is not None:
        about["ldm.size"] = str(size)
    return module.export(path, dtype=DTYPES[dtype], metadata=about)


Rows = Sequence[tuple[str, Sequence[Image.Image]]]


def leave_pictures(folder: Path, before: Rows, after: Rows) -> Path:
    """Every sample as a PNG of its own, and a sheet of all prompts before and after training -> the sheet."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for k, ((prompt, old), (_, new)) in enumerate(zip(before, after, strict=True)):
        rows += [(f"before: {prompt}", old), (f"after: {prompt}", new)]
        for i, image in enumerate(new):
            save_picture(folder / f"{k:02d}-{i:02d}.png", image, {"prompt": prompt})
    return save_picture(folder / "contact_sheet.png", contact_sheet(rows), {"prompts": [p for p, _ in after]})


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


class Stopwatch:
    """Seconds of each phase of a run: `with watch("training"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = round(time.perf_counter() - start, 2)
