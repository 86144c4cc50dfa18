"""A run's config: parsed once, with a range for every number, and refused before any work."""

import inspect
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.checkpoints.save import DTYPES
from ldm.config import load_config, param_of, save_config
from ldm.errors import UserError
from ldm.runs import job
from ldm.runs.job import run_job
from ldm.runs.options import parse
from ldm.runs.validate import validate
from ldm.schema import ExportConfig, RunConfig
from ldm.targets import get_class

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted({*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs/storybook").glob("[!b]*.yaml")})
NODES = [
    "ldm.data.dreambooth.DreamBoothDataModule",
    "ldm.evaluation.photos.PhotoEvaluation",
    "ldm.evaluation.storybook.StorybookEvaluation",
    "ldm.models.autoencoder.AutoencoderKL",
    "ldm.models.lora.LoRA",
    "ldm.models.text_encoder.CLIPTextEncoder",
    "ldm.models.unet.UNetModel",
    "ldm.storybook.dataset.StorybookDataModule",
    "ldm.storybook.stream.StorybookStream",
    "ldm.storybook.training.autoencoder.AutoencoderTask",
    "ldm.storybook.training.judge.JudgeTask",
    "ldm.training.latent_diffusion.LatentDiffusion",
    "ldm.training.techniques.LearnedToken",
    "ldm.storybook.training.text_encoder.TextEncoderTask",
]
NEW_WORD = "{target: ldm.training.techniques.LearnedToken, params: {word: <me>, init: a}}"
MAIN = ["--base", str(ROOT / "configs/dreambooth.yaml")]
LITERALS = [
    *("rex #2", "dog # cat", "#", "2024", "007", "no", "null", "~", "12:30", "1e-6", "0x1f", "[x]"),
    *("{a: 1}", "a: b", "'single'", '"double"', "both ' and \"", "  spaces  ", "two\nlines", "tab\t", ""),
    *("!!int 3", "&a *a", "${oc.env:HOME}", "${seed}", "\\${seed}", "\\\\${seed}", "$x", "}", "a\\b\\"),
    *("key=value", "a,b", "- x", "Ж é 犬", "2024-01-01", "yes", ".inf"),
]


def refused(words: list[str], *more: str) -> str:
    """The one error of a config, which is the same in a dry run and a run, and leaves nothing behind."""
    with pytest.raises(UserError) as error:
        job.plan(parse([*words, *more]))
    with pytest.raises(UserError) as again:
        run_job(parse([*words, *more]))
    assert str(error.value) == str(again.value)
    assert not Path("logs").exists() and not Path("priors").exists()
    return str(error.value)


def test_values_of_flags_are_literal(workdir: Path):
    """In the config, and in the one that the run's folder keeps."""
    flags = ("name", "data_root", "reg_data_root", "class_word", "actual_resume")
    for value in LITERALS:
        config = parse([*MAIN, *(f"--{flag}={value}" for flag in flags)])
        params = config.data["params"]
        found = [config.name, params["subject_root"], params["prior_root"], params["class_word"]]
        assert [*found, config.base_checkpoint] == [value] * 5
        save_config(config.source, workdir / "kept.yaml")
        assert RunConfig.read(workdir / "kept.yaml") == config


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.text(st.sampled_from("a\\${}:'\" #\n[0]-,.~") | st.characters(exclude_categories=["Cs"]), max_size=9)
)
def test_any_text_reaches_the_config(value: str):
    assert load_config([], literals={"a.b": f"x{value}"}).a.b == f"x{value}"


def test_the_seed_is_a_number():
    assert parse([*MAIN, "--seed", "007"]).seed == 7
    for wrong in ("1e3", "soon", "", "1.5", "[1]"):
        with pytest.raises(UserError, match="--seed"):
            parse([*MAIN, f"--seed={wrong}"])
    for wrong in ("-1", str(2**32)):
        with pytest.raises(UserError, match="seed"):
            parse([*MAIN, f"--seed={wrong}"])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_name_no_value_of_the_run(path: Path):
    config = RunConfig.parse(load_config([path]))
    assert "${" not in path.read_text(encoding="utf-8")
    if config.is_dreambooth:
        assert param_of(config.model, "seed") == config.seed
        data = (param_of(config.data, "seed"), param_of(config.data, "accumulate"))
        assert data == (config.seed, config.trainer.accumulate_grad_batches)


def test_the_run_gives_its_values():
    config = parse([*MAIN, "--seed=9", "trainer.accumulate_grad_batches=2"])
    assert [config.model["params"]["seed"], config.data["params"]["seed"]] == [9, 9]
    assert config.data["params"]["accumulate"] == 2
    assert "seed" not in config.container["model"]["params"]
    same = ["model.params.seed=9", "data.params.seed=${seed}", "data.params.accumulate=2"]
    assert parse([*MAIN, "--seed=9", "trainer.accumulate_grad_batches=2", *same]) == config
    for key in ("model.params.seed", "data.params.seed", "data.params.accumulate"):
        with pytest.raises(UserError, match=f"the run gives it|{key}"):
            parse([*MAIN, f"{key}=4"])
    drawings = RunConfig.parse(load_config([ROOT / "configs/storybook/base.yaml"]))
    assert (drawings.seed, drawings.data["params"]["seed"]) == (23, 11)


def numbers(annotation: object) -> bool:
    """Whether an annotation takes an int or a float without bounds."""
    inner = typing.get_args(annotation)
    if annotation in (int, float):
        return True
    if typing.get_origin(annotation) is typing.Annotated or typing.get_origin(annotation) is typing.Literal:
        return False
    return any(map(numbers, inner))


@pytest.mark.parametrize("target", [*NODES, "sections"])
def test_every_number_has_a_range(target: str):
    if target == "sections":
        hints = typing.get_type_hints(RunConfig, include_extras=True)
        kinds = [RunConfig, *(kind for kind in hints.values() if is_dataclass(kind))]
        assert len(kinds) == 6
    else:
        kinds = [get_class(target)]
    for kind in kinds:
        hints = typing.get_type_hints(kind.__init__, include_extras=True)
        free = [name for name in inspect.signature(kind).parameters if numbers(hints[name])]
        free = [
            name for name in free if name not in ("devices", "use_checkpoint")
        ]  # checked by their classes
        assert free == [], kind


ADAMW = "model.params.optimizer={target: ldm.optim.fused_adamw.FusedAdamW, params: {"


@pytest.mark.parametrize(
    "override",
    [
        *(
            "model.params.trainable.learning_rate=-1e-6",
            "model.params.objective.prior_loss_weight=-1",
            "model.params.process.timesteps=0",
        ),
        *(
            f"{ADAMW}betas: [0.9]}}}}",
            f"{ADAMW}betas: [0.9, 1.0]}}}}",
            "model.params.trainable.text_encoder_steps=-1",
        ),
        *(
            "model.params.lr_schedule={target: ldm.optim.schedules.WSD, params: {warmup_steps: -1}}",
            "model.params.process.linear_start=0",
            "model.params.objective.weighting.params.gamma=0",
        ),
        *(
            "model.params.process.timesteps=100000000000",
            f"{ADAMW}weight_decay: .nan}}}}",
            "model.params.process.linear_end=1.0",
        ),
        *(
            "model.params.trainable.learning_rate=.inf",
            "model.params.trainable.learning_rate=.nan",
            "model.params.seed=-1",
        ),
        *("trainer.gradient_clip_val=-1", "trainer.max_steps=0", "trainer.max_steps=-1"),
        *("trainer.log_every_n_steps=0", "trainer.val_check_interval=0.5", "trainer.val_check_interval=0"),
        *("trainer.strategy=bogus", "trainer.accelerator=abacus", "trainer.precision=16-true"),
        *("trainer.accumulate_grad_batches=0", "trainer.num_nodes=0", "trainer.limit_train_batches=1"),
        *("trainer.limit_train_batches=0", "trainer.max_epochs=0", "trainer.overfit_batches=1"),
        *("trainer.fast_dev_run=true", "trainer.logger=true", "trainer.callbacks=null", "trainer.plugins=[]"),
        *("trainer.default_root_dir=x", "trainer.max_time=1", "trainer.barebones=true"),
        *("samples.n=-1", "samples.n=0", "samples.steps=0", "samples.batch_size=0", "samples.seed=-1"),
        *("priors.batch_size=0", "priors.steps=0", "priors.guidance_scale=-1", "priors.seed=4294967296"),
        *("ema_decay=1.5", "ema_decay=1.0", "ema_decay=-0.1", "ema_device=cuda", "ema_every=0"),
        *("seed=-1", "seed=4294967296", "checkpoint_every=0", "checkpoints_kept=0", "export.dtype=half"),
        *("export.dtype=float16", "export.weights=first", "online_eval.every_steps=-1"),
        *("data.params.prior_caption_dropout=1.1", "data.params.batch_size=0", "data.params.num_priors=-1"),
        "model.params.trainable.lora={target: ldm.models.lora.LoRA, params: {alpha: 0}}",
        "model.params.trainable.lora={target: ldm.models.lora.LoRA, params: {rank: 0}}",
        "model.params.trainable.lora={target: ldm.models.unet.UNetModel}",
        "model.params.trainable.lora={params: {rank: 4}}",
        "model.params.trainable.learned_token={params: {word: x}}",
        "logger={target: torch.optim.AdamW}",
        "model.target=ldm.data.dreambooth.DreamBoothDataModule",
        "model.params.unet.target=null",
        "evaluation={target: ldm.evaluation.storybook.StorybookEvaluation, params: {seeds: 0}}",
        "name=${oc.env:HOME}",
        "base_checkpoint=a-${oc.decode:x}",
    ],
)
def test_what_no_run_can_have_is_refused_by_its_key(override: str):
    with pytest.raises(UserError) as error:
        parse([*MAIN, override])
    assert override.split("=")[0].rpartition(".")[2] in str(error.value)


def test_interpolations_of_keys_are_allowed():
    config = parse([*MAIN, "samples.prompts.0=a ${data.params.class_word} here", "name=x${seed}"])
    assert (config.samples.prompts[0], config.name) == ("a dog here", "x23")


NO_LAYERS = "model.params.trainable.lora={target: ldm.models.lora.LoRA, params: {unet: [], text_encoder: []}}"
STORYBOOK_BASE = ["model.target=ldm.storybook.training.base.StorybookBase"]
STORYBOOK_BASE += ["model.params.trainable.text_encoder=false"]
STORYBOOK = "evaluation.target=ldm.evaluation.storybook.StorybookEvaluation"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["name=../../x"], "(name)"),
        (["name=/tmp/x"], "(name)"),
        (["name=''"], "(name)"),
        (["name=.."], "(name)"),
        (["name=a/../../b"], "(name)"),
        (["name=a//b"], "(name)"),
        (["name='a/ '"], "(name)"),
        (["--name=" + "x" * 300], "(name)"),
        (["base_checkpoint="], "needs a base"),
        (["base_checkpoint=gone.safetensors"], "gone.safetensors"),
        (["base_parts.unet=tiny.safetensors", "base_checkpoint=null"], "needs a base"),
        (["base_parts={judge: tiny.safetensors}"], "`judge` is not a network"),
        (
            ["model.params.trainable.unet=false", "model.params.trainable.text_encoder=false"],
            "Nothing in the model",
        ),
        ([NO_LAYERS], "Nothing"),
        (
            ["model.params.trainable.unet=false", "model.params.trainable.text_encoder_steps=2"],
            "after step 2",
        ),
        (["model.params.trainable.learning_rate=0"], "rate is 0"),
        (["model.params.unet.params.num_groups=7"], "num_groups 7 does not divide"),
        (["model.params.unet.params.num_heads=5"], "num_heads 5 does not divide"),
        (["model.params.unet.params.num_head_channels=5"], "num_head_channels 5 does not divide"),
        (["model.params.unet.params.channel_mult=[]"], "one level or more"),
        (["model.params.vae.params.num_groups=7"], "num_groups 7 does not divide"),
        (["model.params.text_encoder.params.num_attention_heads=5"], "num_attention_heads 5 does not"),
        (["model.params.text_encoder.params.hidden_act=sine"], "no activation"),
        (["model.params.text_encoder.params.vocab_size=9"], "vocabulary"),
        (["model.params.unet.params.context_dim=64"], "unet.params.context_dim"),
        (["model.params.unet.params.in_channels=8"], "unet.params.in_channels"),
        (["model.params.unet.params.out_channels=8"], "unet.params.out_channels"),
        (["model.params.optimizer=adamw_8bit"], "bitsandbytes"),
        (["samples.prompts.0=a {breed} dog"], "(samples.prompts.0)"),
        (["samples.steps=1001"], "(samples.steps)"),
        (["priors.steps=1001"], "(priors.steps)"),
        ([STORYBOOK, "evaluation.params.steps=1001"], "(evaluation.params.steps)"),
        ([STORYBOOK, "evaluation.params.judge_file=gone"], "gone"),
        (["evaluation.target=torch.optim.SGD"], "evaluation.target"),
        (["export.weights=best"], "(export.weights)"),
        ([STORYBOOK, "export.weights=best", "online_eval.every_steps=8"], "(export.weights)"),
        (["logger.target=pytorch_lightning.loggers.WandbLogger"], "wandb"),
        (["trainer.num_nodes=2"], "(trainer.num_nodes)"),
        (["trainer.devices=0"], "(trainer.devices)"),
        (["trainer.devices=[0]"], "(trainer.devices)"),
        (["trainer.devices=two"], "(trainer.devices)"),
        (["trainer.precision=16-mixed"], "(trainer.precision)"),
        (["data.params.size=18"], "18"),
        (["data.params.subject_root=gone"], "gone"),
        (STORYBOOK_BASE, "(model.target)"),
        (["trainer.strategy=fsdp"], "only one"),
        ([f"model.params.trainable.learned_token={NEW_WORD}"], "Set data.params.identifier=<me>"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_a_run_that_cannot_end_well_is_refused_before_any_work(
    words: list[str], monkeypatch: pytest.MonkeyPatch, change: list[str], said: str
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert said in refused(words, *change)


def test_a_device_that_is_not_there_is_refused(words: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    for accelerator in ("gpu", "cuda", "mps"):
        assert "(trainer.accelerator)" in refused(words, f"trainer.accelerator={accelerator}")


def test_a_dry_run_reads_the_photos(words: list[str], subject_folder: Path):
    plan = job.plan(parse([*words, "checkpoints_kept=1"]))
    assert "checkpoints" in plan and "a photo of {identifier}" in plan and not Path("logs").exists()
    Image.new("RGB", (8, 8)).save(subject_folder / "torn.png")
    torn = (subject_folder / "torn.png").read_bytes()[:40]
    (subject_folder / "torn.png").write_bytes(torn)
    assert "torn.png" in refused(words)


def test_a_disk_without_room_is_refused_before_any_work(words: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1))
    assert "checkpoints" in refused(words)


def test_sections_that_another_training_would_not_use_are_refused(workdir: Path):
    words = ["--base", str(ROOT / "configs/storybook/judge.yaml")]
    validate(parse(words))
    for section in ("samples.n=2", "online_eval.every_steps=500", "priors.steps=5"):
        with pytest.raises(UserError, match=section.partition(".")[0]):
            validate(parse([*words, section]))


def test_dtypes_of_an_export_are_those_that_files_have():
    (dtype, _) = (typing.get_args(f.type) for f in fields(ExportConfig))
    assert set(dtype) == set(DTYPES)
