"""A tiny Stable Diffusion XL with random weights through the whole of main.py."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from omegaconf import OmegaConf
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from ldm.checkpoints.load import open_model
from ldm.commands import convert, sample
from ldm.errors import UserError
from ldm.runs.job import plan, run_job
from ldm.runs.options import parse
from tests.families import tiny_sdxl

TRAINING = {"trainable": {"learning_rate": 1e-3}, "objective": {"prior_target": "teacher"}}
LORA = ["name=lora", "model.params.trainable.lora.target=ldm.models.lora.LoRA"]
LORA += ["model.params.trainable.lora.params.rank=2"]


@pytest.fixture(scope="module")
def base(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The single file; the folder of diffusers that it is made from is `diffusers` beside it."""
    folder = tmp_path_factory.mktemp("base") / "diffusers"
    tiny_sdxl.saved(tiny_sdxl.pipeline(tiny_tokenizer), folder, tiny_tokenizer)
    return convert.main(convert.parse([str(folder), str(folder.with_name("xl.safetensors"))]))


@pytest.fixture
def job(workdir: Path, base: Path, subject_folder: Path) -> list[str]:
    """Command-line arguments of a job of 2 steps, photos of several sizes, prior images of its own."""
    known = dict(open_model(base).config)
    networks = {name: known.pop(name) for name in ("unet", "vae", "text_encoder")}
    config = {
        "name": "tiny",
        "seed": 5,
        "base_checkpoint": str(base),
        "checkpoint_every": 1,
        "model": {
            "target": "ldm.training.latent_diffusion.LatentDiffusion",
            "params": networks | {"process": known} | TRAINING,
        },
        "data": {
            "target": "ldm.data.dreambooth.DreamBoothDataModule",
            "params": {
                "subject_root": str(subject_folder),
                "class_word": "disc",
                "size": 16,
                "batch_size": 2,
                "num_priors": 2,
                "crop": "random",
                "prior_caption_dropout": 0.5,
                "validation_batches": 1,
            },
        },
        "priors": {"steps": 2, "guidance_scale": 2.0},
        "trainer": {
            "max_steps": 2,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "val_check_interval": 1,
        },
        "samples": {"prompts": ["a photo of {identifier}"], "n": 1, "steps": 2},
        "export": {"dtype": "fp32"},
    }
    OmegaConf.save(OmegaConf.create(config), workdir / "tiny.yaml")
    return ["--base", "tiny.yaml"]


def test_photos_of_two_shapes_in_buckets(job: list[str], subject_folder: Path):
    """Each step has one shape; both are trained on, and prior images are drawn at both."""
    for k in range(2):
        noise = np.random.default_rng(k).integers(0, 256, (12, 48, 3), dtype=np.uint8)
        Image.fromarray(noise).save(subject_folder / f"wide-{k}.png")
    words = [*job, "data.params.buckets={}", "trainer.max_steps=4"]
    assert "8 x 32 pixels: 2 photos, 1 prior image" in plan(parse(words))
    assert all(path.exists() for path in run_job(parse(words)))
    names = " ".join(path.name for path in Path("priors").iterdir())
    assert "-8x32-" in names and len(names.split()) == 2


def test_full_training_and_what_it_leaves(job: list[str], base: Path):
    assert all(path.exists() for path in run_job(parse(job)))
    before, trained = load_file(base), load_file("logs/tiny/model.safetensors")
    assert trained.keys() == before.keys()
    moved = {name for name in trained if not torch.equal(trained[name], before[name])}
    assert not any(name.startswith("first_stage_model.") for name in moved)
    first = {name for name in moved if name.startswith("conditioner.embedders.0.")}
    unused = ("layers.2.", "final_layer_norm")  # nothing depends on them
    assert first and not any(part in name for name in first for part in unused)
    for part in ("label_emb.0.0", "embedders.1.model.text_projection", "resblocks.3.", "input_blocks.3.1."):
        assert any(part in name for name in moved), part
    assert json.loads(Path("logs/tiny/metrics.json").read_text())["prior_images"] == 2
    read = StableDiffusionXLPipeline.from_single_file(
        "logs/tiny/model.safetensors", config=str(base.with_name("diffusers")), local_files_only=True
    )
    projection = trained["conditioner.embedders.1.model.text_projection"]
    assert torch.equal(read.text_encoder_2.text_projection.weight, projection.T)

    run_job(parse([*job, "name=stopped", "trainer.max_steps=1"]))
    run_job(parse([*job, "name=stopped"]), "logs/stopped", allow_config_change=True)
    again = load_file("logs/stopped/model.safetensors")
    assert all(torch.equal(trained[name], again[name]) for name in trained)


def test_a_lora_and_a_new_word(job: list[str], subject_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Files for other tools; the checkpoint, with both in it, draws what the model file does."""
    token = "model.params.trainable.learned_token"
    words = [f"{token}.target=ldm.training.techniques.LearnedToken", f"{token}.params.word=<my-disc>"]
    words += [f"{token}.params.init=disc", "data.params.identifier=<my-disc>"]
    run_job(parse([*job, *LORA, *words]))
    with safe_open("logs/lora/loras/lora.safetensors", "pt") as file:
        keys, metadata = set(file.keys()), file.metadata()
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert {key.split("_")[1] for key in keys} == {"unet", "te1", "te2"}
    assert "lora_unet_input_blocks_3_1_transformer_blocks_1_attn2_to_k.lora_down.weight" in keys
    assert {"lora_te1_text_model_encoder_layers_1_self_attn_q_proj.alpha"} <= keys
    assert {"lora_te2_text_model_encoder_layers_3_self_attn_q_proj.alpha"} <= keys
    assert not any(key.startswith("lora_te1_text_model_encoder_layers_2") for key in keys)
    embedding = load_file("logs/lora/embeddings/my-disc.safetensors")
    assert {key: tensor.shape for key, tensor in embedding.items()} == {"clip_l": (4, 24), "clip_g": (4, 32)}
    ask = ["--prompt", "a <my-disc>", "--n", "1", "--steps", "2", "--crop", "3", "5", "--model"]
    images = []
    (checkpoint,) = Path("logs/lora/checkpoints").glob("step-*2.ckpt")
    for out, model in (("a", "logs/lora"), ("b", str(checkpoint))):
        monkeypatch.setattr("sys.argv", ["sample.py", *ask, model, "--out", out])
        sample.main(sample.parse())
        (file,) = Path(out).glob("000-*.png")
        images.append(Image.open(file))
    assert np.abs(np.asarray(images[0], int) - np.asarray(images[1], int)).max() <= 1
    said = json.loads(images[0].text["dreambooth"])
    assert said["unconditional"] == "zeros" and said["crop"] == [3, 5] and said["original"] == [16, 16]
    photo = ["--init_image", str(subject_folder / "2.png"), "--strength", "0.5"]
    monkeypatch.setattr("sys.argv", ["sample.py", *ask, "logs/lora", "--out", "c", *photo])
    sample.main(sample.parse())
    (file,) = Path("c").glob("000-*.png")
    again, start = (np.asarray(Image.open(name).resize((16, 16)), int) for name in (file, photo[1]))
    assert json.loads(Image.open(file).text["dreambooth"])["strength"] == 0.5
    assert not np.array_equal(again, np.asarray(images[0], int)) and again.shape == start.shape


def test_a_wrong_base_vae_or_size_is_refused_before_any_work(
    job: list[str], base: Path, tiny_model_file: Path, caplog: pytest.LogCaptureFixture
):
    vae = base.parent / "vae"
    if not vae.exists():
        shutil.copytree(base.with_name("diffusers") / "vae", vae)
        config = json.loads((vae / "config.json").read_text())
        (vae / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.18215}))
    for words, said in (
        (
            [f"base_checkpoint={tiny_model_file}"],
            "of Stable Diffusion 1.x, but the config is of Stable",
        ),
        ([f"base_parts.vae={vae}"], "scales its latents by 0.18215, the model's by 0.13025"),
        (["data.params.size=20"], "20 is not a multiple of 8"),
        (["model.params.unet.params.adm_in_channels=1500"], "1500 is not the 1556 of"),
        (["model.params.trainable.text_encoder_learning_rate={clip_l: 1}"], "Give one of clip_l"),
    ):
        with pytest.raises(UserError, match=said):
            plan(parse([*job, *words]))
    assert not Path("logs").exists() and "SDXL draws badly below 512 pixels" in caplog.text
