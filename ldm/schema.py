"""The config of a run as dataclasses: a field for each section of the YAML, with every default and range.

`RunConfig.parse` reads a merged config once; `ldm.runs.validate` says whether it can end well.
"""

import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import Logger

from ldm.annotations import (
    Builds,
    Decay,
    Node,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Seed,
)
from ldm.config import check, load_config, takes, to_container, with_params
from ldm.data.dreambooth import DreamBoothDataModule
from ldm.diffusion.schedule import Spacing
from ldm.errors import UserError
from ldm.precision import Precision
from ldm.sampler_nodes import SamplerNode
from ldm.targets import get_class

MatmulPrecision = Literal["highest", "high", "medium"]
SET_BY_RUN = "a run sets it itself"
ENDLESS = "a run is one endless epoch, which ends after trainer.max_steps"


@dataclass(frozen=True)
class TrainerOptions:
    """Options of Lightning's Trainer, under their own names.

    Args:
        max_steps: optimizer steps of the run.
        accelerator: kind of device.
        devices: a number, a list of GPUs, or "auto".
        num_nodes: more than 1 has to be the number that torchrun or srun has started.
        strategy: with several devices: "ddp" splits the batch, "fsdp" weights and optimizer states too.
        precision: "bf16-mixed" or "16-mixed" is autocast over float32 weights, "bf16-true" bfloat16 weights.
        accumulate_grad_batches: micro-batches per optimizer step.
        gradient_clip_val: bound of the norm of all gradients, or of each value.
        gradient_clip_algorithm: which of the two.
        log_every_n_steps: optimizer steps between two points of a curve.
        val_check_interval: micro-batches between two validations; None: none.
        enable_progress_bar: whether there is a bar.
        benchmark: cuDNN tries its algorithms; None: as torch has it.
        deterministic: torch refuses, or "warn" warns of, operations whose result varies.
        detect_anomaly: autograd names the operation that gave NaN; slow.
    """

    REFUSED: ClassVar[Mapping[str, str]] = {
        "logger": "the section `logger` names it",
        "limit_val_batches": "data.params.validation_batches says how many there are",
        **dict.fromkeys(("callbacks", "plugins", "default_root_dir", "use_distributed_sampler"), SET_BY_RUN),
        **dict.fromkeys(("enable_checkpointing", "enable_model_summary", "barebones"), SET_BY_RUN),
        "num_sanity_val_steps": SET_BY_RUN,
        **dict.fromkeys(("max_epochs", "min_epochs", "min_steps", "max_time", "fast_dev_run"), ENDLESS),
        **dict.fromkeys(("limit_train_batches", "overfit_batches", "check_val_every_n_epoch"), ENDLESS),
        "reload_dataloaders_every_n_epochs": ENDLESS,
    }

    max_steps: PositiveInt
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    devices: int | str | list[NonNegativeInt] = 1
    num_nodes: PositiveInt = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    precision: Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"] = "32-true"
    accumulate_grad_batches: PositiveInt = 1
    gradient_clip_val: NonNegativeFloat | None = None
    gradient_clip_algorithm: Literal["norm", "value"] = "norm"
    log_every_n_steps: PositiveInt = 50
    val_check_interval: PositiveInt | None = None
    enable_progress_bar: bool = True
    benchmark: bool | None = None
    deterministic: bool | Literal["warn"] | None = None
    detect_anomaly: bool = False


@dataclass(frozen=True)
class PriorsConfig:
    """How the base model generates prior images, and the folder of their sets.

    Args:
        folder: where sets are kept, and found again by name.
        sampler: a name of docs/samplers.md, or a node of one's own.
        spacing: of the steps; None: as suits the sampler.
        steps: of the sampler.
        guidance_scale: of classifier-free guidance; 1 is none.
        negative_prompt: of which guidance moves away; null: none, which is zeros to SDXL, elsewhere "".
        seed: of the first image.
        batch_size: images at a time, which decides none of them.
        precision: of the networks; "auto" is bf16 on a CUDA device and fp32 elsewhere.
    """

    folder: str = "priors"
    sampler: SamplerNode = "ddim"
    spacing: Spacing | None = None
    steps: PositiveInt = 50
    guidance_scale: NonNegativeFloat = 7.5
    negative_prompt: str | None = None
    seed: Seed = 0
    batch_size: PositiveInt = 16
    precision: Precision = "auto"


@dataclass(frozen=True)
class SamplesConfig:
    """The samples of a run: `n` images of each prompt, which may contain {identifier} and {class_word}.

    Args:
        prompts: templates, sampled before and after training.
        n: images of each prompt.
        sampler: a name of docs/samplers.md, or a node of one's own.
        spacing: of the steps; None: as suits the sampler.
        steps: of the sampler.
        guidance_scale: of classifier-free guidance; 1 is none.
        negative_prompt: of which guidance moves away; null: none, which is zeros to SDXL, elsewhere "".
        guidance_base: the base, not the trained model, predicts for the negative prompt.
        seed: of the first image of each prompt.
        batch_size: images at a time, which decides none of them.
        precision: as for prior images.
        every_steps: optimizer steps between previews; 0: none.
        preview_n: images of each prompt in a preview.
        height, width: pixels; None: `size` of the data, with buckets the photos' shapes in turn.
    """

    prompts: Sequence[str] = field(default_factory=list)
    n: PositiveInt = 4
    sampler: SamplerNode = "ddim"
    spacing: Spacing | None = None
    steps: PositiveInt = 50
    guidance_scale: NonNegativeFloat = 7.5
    negative_prompt: str | None = None
    guidance_base: bool = False
    seed: Seed = 23
    batch_size: PositiveInt = 16
    precision: Precision = "auto"
    every_steps: NonNegativeInt = 0
    preview_n: PositiveInt = 2
    height: PositiveInt | None = None
    width: PositiveInt | None = None


@dataclass(frozen=True)
class OnlineEvalConfig:
    """When a run is evaluated during training.

    every_steps: optimizer steps between two evaluations, a multiple of the validation interval; 0: none.
    params: of the `evaluation`, where they differ from its own: few images in few steps cost little.
    early_stop: evaluations without a better score after which training ends; 0: never.
    """

    every_steps: NonNegativeInt = 0
    params: Mapping[str, Any] = field(default_factory=dict)
    early_stop: NonNegativeInt = 0


@dataclass(frozen=True)
class ExportConfig:
    """The model file of a run.

    dtype: of its weights. weights: the last or, by online evaluation, the best ones.
    """

    dtype: Literal["fp32", "fp16", "bf16"] = "fp16"
    weights: Literal["last", "best"] = "last"


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """The sections that `run.fit` takes.

    Args:
        trainer: options of Lightning's Trainer.
        logger: one of Lightning's, in place of TensorBoard's.
        ema_decay: of the exponential moving average (EMA) of the weights, which is then what is sampled and
            exported; None: no average.
        ema_device: "cpu" keeps the average off the GPU.
        ema_every: optimizer steps between two updates of the average.
        checkpoint_every: optimizer steps between two checkpoints.
        checkpoints_kept: how many of the newest stay, beside the best.
    """

    trainer: TrainerOptions
    logger: Annotated[Node, Builds(Logger)] | None = None
    ema_decay: Decay | None = None
    ema_device: Literal["cpu"] | None = None
    ema_every: PositiveInt = 1
    checkpoint_every: PositiveInt = 250
    checkpoints_kept: PositiveInt = 2


@dataclass(frozen=True, kw_only=True)
class RunConfig(FitConfig):
    """All sections of a run's config.

    Args:
        name: the run is kept in logs/NAME.
        seed: all random numbers follow from it.
        model: what is trained.
        data: the photos, or for the storybook's own trainings its drawings.
        base_checkpoint: the file or folder that is fine-tuned, or its id on the Hugging Face hub: owner/name,
            owner/name@revision, owner/name:file.safetensors or owner/name:fp16.
        base_parts: network -> file or hub id of its weights, in place of that network of `base_checkpoint`.
        matmul_precision: of float32 matrix products on a GPU, as `torch.set_float32_matmul_precision` has it.
        priors: how prior images are generated.
        samples: what is sampled before and after training.
        evaluation: the metrics of metrics.json; None: none.
        evaluate_also: name -> params of `evaluation` that differ: the same metrics once more.
        online_eval: metrics during training.
        export: the model file.
        source: the merged config as it was written, for config.yaml and the model file.

    `parse` gives model and data the run's seed, and the data its micro-batches per step, and whether the
    objective needs masks. Another seed in a DreamBooth run is refused; a data module of drawings may have
    one of its own.
    """

    name: str
    seed: Seed
    model: Annotated[Node, Builds(pl.LightningModule)]
    data: Annotated[Node, Builds(pl.LightningDataModule)]
    base_checkpoint: str | None = None
    base_parts: dict[str, str | None] | None = None
    matmul_precision: MatmulPrecision = "high"
    priors: PriorsConfig = PriorsConfig()
    samples: SamplesConfig = SamplesConfig()
    evaluation: Node | None = None
    evaluate_also: dict[str, dict] | None = None
    online_eval: OnlineEvalConfig = OnlineEvalConfig()
    export: ExportConfig = ExportConfig()
    source: DictConfig = field(default_factory=lambda: OmegaConf.create({}), compare=False, repr=False)

    @classmethod
    def parse(
        cls,
        config: DictConfig | Mapping[str, Any],
        *,
        paths: Sequence[str | Path] = (),
        dotlist: Sequence[str] = (),
    ) -> Self:
        """Checks names, types and ranges -> the config. Raises one UserError that names every error.

        paths, dotlist: the sources of the config, for messages.
        """
        sections = typing.get_type_hints(cls, include_extras=True)
        del sections["source"]
        required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
        check(config, sections, required=required, paths=paths, dotlist=dotlist)
        values = {
            name: sections[name](**value) if is_dataclass(sections[name]) else value
            for name, value in to_container(config).items()
        }
        return cls(**values, source=OmegaConf.create(config))._with_run_values()

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The config that a run's folder keeps."""
        return cls.parse(load_config([path]), paths=[path])

    @property
    def is_dreambooth(self) -> bool:
        """Whether the run learns a subject from photos, with samples and a report."""
        return issubclass(get_class(self.data["target"]), DreamBoothDataModule)

    @property
    def container(self) -> dict[str, Any]:
        """What `source` holds, as dicts, lists and scalars."""
        return to_container(self.source)

    def _with_run_values(self) -> Self:
        accumulate = self.trainer.accumulate_grad_batches
        values = {"model": {"seed": self.seed}, "data": {"seed": self.seed, "accumulate": accumulate}}
        if ((self.model.get("params") or {}).get("objective") or {}).get("masks"):
            values["data"]["masks"] = True
        return replace(self, **{key: self._given(key, own) for key, own in values.items()})

    def _given(self, section: str, values: Mapping[str, int]) -> Node:
        """The node of a section with those of the run's values that its class takes."""
        node: Node = getattr(self, section)
        own = node.get("params") or {}
        taken = {name: value for name, value in values.items() if takes(node, name)}
        for name, value in taken.items():
            if self.is_dreambooth and own.get(name, value) != value:
                what = f"`{name}` is {own[name]} here and {value} for the run"
                remedy = "Take it off: the run gives it."
                raise UserError(what, where=f"{section}.params.{name}", remedy=remedy)
        return with_params(node, taken | {name: own[name] for name in taken if name in own})
