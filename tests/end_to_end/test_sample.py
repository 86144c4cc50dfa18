"""scripts/sample.py from the command line to files."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.checkpoints.load import file_hash
from ldm.checkpoints.save import save_model

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "sample.py"
QUICK = ["--steps", "2", "--height", "16", "--width", "16", "--device", "cpu"]


def sample(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as end:
        if end.code != 0:
            raise


def pixels(path: Path) -> bytes:
    with Image.open(path) as picture:
        return picture.tobytes()


def test_pictures_sheet_and_settings(workdir, tiny_model_file, monkeypatch, capsys):
    Path("more.txt").write_text("# places\n\na car at night\n", encoding="utf-8")
    options = ["--model", tiny_model_file, "--n", 3, "--seed", 5, "--negative_prompt", "blur", *QUICK]
    prompts = ["--prompt", "a dog", "../a/ red cat?", "--prompts", "more.txt"]
    sample(monkeypatch, *prompts, *options, "--out", "drawn", "--batch_size", 4)
    names = [
        f"{row:03d}-{slug}-{seed}.png"
        for row, slug in enumerate(["a-dog", "a-red-cat", "a-car-at-night"])
        for seed in (5, 6, 7)
    ]
    assert sorted(p.name for p in Path("drawn").iterdir()) == [*names, "contact_sheet.png"]
    files = [str(Path("drawn", name)) for name in [*names, "contact_sheet.png"]]
    assert capsys.readouterr().out.splitlines() == [f"model: {tiny_model_file}", *files]
    with Image.open(Path("drawn", names[1])) as picture:
        about = json.loads(picture.text["dreambooth"])
        assert picture.text["parameters"].startswith("a dog\nNegative prompt: blur\nSteps: 2, Sampler: DDIM")
    assert {"prompt": "a dog", "seed": 6, "steps": 2, "height": 16, "model": "tiny"}.items() <= about.items()
    with Image.open("drawn/contact_sheet.png") as sheet:
        assert sheet.width > 3 * 128 and sheet.height > 3 * 128

    sample(monkeypatch, "--prompt", "a dog", *options, "--out", "alone", "--batch_size", 1, "--low_memory")
    difference = [
        abs(a - b)
        for n in names[:3]
        for a, b in zip(pixels(Path("drawn", n)), pixels(Path("alone", n)), strict=True)
    ]
    assert max(difference) <= 1
    assert pixels(Path("drawn", names[0])) != pixels(Path("drawn", names[1]))


def test_the_newest_run_is_found_and_named(workdir, tiny_model_file, monkeypatch, capsys):
    for age, name in enumerate(["new", "old"]):
        run = Path("logs", name)
        run.mkdir(parents=True)
        shutil.copy(tiny_model_file, run / "model.safetensors")
        (run / "config.yaml").touch()
        os.utime(run / "model.safetensors", (1e9 - age, 1e9 - age))
    sample(monkeypatch, "--prompt", "a dog", "--n", 1, *QUICK)
    assert "model: logs/new/model.safetensors" in capsys.readouterr().out
    (picture,) = Path("logs/new/samples").glob("*/000-a-dog-23.png")
    with Image.open(picture) as opened:
        assert json.loads(opened.text["dreambooth"])["model"] == "new"
    sample(monkeypatch, "--prompt", "a dog", "--n", 1, "--model", "logs/old", "--out", "x", *QUICK)
    assert pixels(Path("x/000-a-dog-23.png")) == pixels(picture)


def test_a_config_stands_in_for_metadata(workdir, tiny_model_file, tiny_config, monkeypatch):
    model = {"target": "ldm.training.latent_diffusion.LatentDiffusion", "params": tiny_config}
    process = tiny_config["process"] | {"parameterization": "v"}
    Path("v.yaml").write_text(json.dumps({"model": model | {"params": tiny_config | {"process": process}}}))
    options = ["--prompt", "a dog", "--n", 1, "--model", tiny_model_file, *QUICK]
    sample(monkeypatch, *options, "--out", "eps")
    sample(monkeypatch, *options, "--out", "v", "--config", "v.yaml")
    assert pixels(Path("eps/000-a-dog-23.png")) != pixels(Path("v/000-a-dog-23.png"))


def test_named_prompts_take_the_words_that_the_model_was_taught(
    workdir, tiny_networks, tiny_config, monkeypatch, capsys
):
    metadata = {
        "ldm.config": json.dumps(tiny_config),
        "ldm.training": json.dumps({"data": {"params": {"class_word": "toy dog"}}}),
        "modelspec.trigger_phrase": "zwx toy dog",
    }
    parts = {part: network.state_dict() for part, network in tiny_networks.items()}
    path = save_model("taught.safetensors", parts, alphas_cumprod=None, metadata=metadata)
    options = ["--prompts", "dreambooth-live", "--n", 1, "--model", path, "--steps", 1, *QUICK[2:]]
    sample(monkeypatch, *options, "--out", "live", "--batch_size", 25)
    assert len(list(Path("live").glob("0*.png"))) == 25
    with Image.open("live/000-a-zwx-toy-dog-in-the-jungle-23.png") as picture:
        assert json.loads(picture.text["dreambooth"])["prompt"] == "a zwx toy dog in the jungle"
    Path("one.txt").write_text("{identifier}: {class_word}\n", encoding="utf-8")
    given = ["--prompts", "one.txt", "--identifier", "sks", "--class_word", "cat", *options[2:]]
    sample(monkeypatch, *given, "--out", "given")
    assert Path("given/000-sks-cat-23.png").exists()
    typed = ["--prompt", "{identifier} {class_word}", "{red} dog", *options[2:]]
    sample(monkeypatch, *typed, "--out", "typed")
    for name, prompt in (("000-zwx-toy-dog-23", "zwx toy dog"), ("001-red-dog-23", "{red} dog")):
        with Image.open(f"typed/{name}.png") as picture:
            assert json.loads(picture.text["dreambooth"])["prompt"] == prompt


def test_a_run_s_own_sampler_steps_and_guidance_are_the_defaults(
    workdir, tiny_networks, tiny_config, monkeypatch
):
    own = {"sampler": "dpm++2m", "spacing": "karras", "steps": 2, "guidance_scale": 1.5}
    metadata = {
        "ldm.config": json.dumps(tiny_config),
        "ldm.training": json.dumps({"samples": own}),
    }
    parts = {part: network.state_dict() for part, network in tiny_networks.items()}
    path = save_model("taught.safetensors", parts, alphas_cumprod=None, metadata=metadata)
    sample(monkeypatch, "--prompt", "a dog", "--n", 1, "--model", path, "--out", "own", *QUICK[2:])
    with Image.open("own/000-a-dog-23.png") as picture:
        assert own.items() <= json.loads(picture.text["dreambooth"]).items()
        assert "Sampler: DPM++ 2M Karras, " in picture.text["parameters"]
    given = ["--sampler", "euler_a", "--spacing", "trailing", "--steps", 3, *QUICK[2:]]
    sample(monkeypatch, "--prompt", "a dog", "--n", 1, "--model", path, "--out", "given", *given)
    with Image.open("given/000-a-dog-23.png") as picture:
        assert "Steps: 3, Sampler: Euler a, " in picture.text["parameters"]


def test_a_sampler_of_ones_own_draws_where_it_is_allowed(
    workdir, tiny_networks, tiny_config, monkeypatch, capsys
):
    """Named by the option or by the run that made the file, which cannot let it in."""
    monkeypatch.syspath_prepend(str(workdir))
    Path("own_sampler.py").write_text(
        "from ldm.diffusion.samplers import euler\n\n"
        "def slow(denoise, x, levels, *, noise=None, callback=None, scale: float = 0.5):\n"
        "    return scale * euler(denoise, x, levels, callback=callback)\n"
    )
    node = {"target": "own_sampler.slow", "params": {"scale": 0.25}}
    metadata = {
        "ldm.config": json.dumps(tiny_config),
        "ldm.training": json.dumps({"samples": {"sampler": node}}),
    }
    parts = {part: network.state_dict() for part, network in tiny_networks.items()}
    path = save_model("taught.safetensors", parts, alphas_cumprod=None, metadata=metadata)
    options = ["--prompt", "a dog", "--n", 1, "--model", path, *QUICK]
    for named in ([], ["--sampler", "own_sampler.slow"]):
        with pytest.raises(SystemExit):
            sample(monkeypatch, *options, *named, "--out", "refused")
        assert "`own_sampler.slow` is not an allowed target" in capsys.readouterr().err
    assert not Path("refused").exists()
    found = {}
    for out, named in [
        ("run", []),
        ("option", ["--sampler", "own_sampler.slow"]),
        ("euler", ["--sampler", "euler"]),
    ]:
        sample(monkeypatch, *options, *named, "--out", out, "--allow", "own_sampler")
        with Image.open(f"{out}/000-a-dog-23.png") as picture:
            found[out] = picture.tobytes(), picture.text["parameters"]
    assert len({pixels for pixels, _ in found.values()}) == 3
    assert "Sampler: slow, " in found["run"][1] and "Sampler: Euler, " in found["euler"][1]


def test_a_picture_is_drawn_over(workdir, tiny_model_file, monkeypatch):
    Image.new("RGB", (40, 20), "orange").save("photo.png")
    options = ["--prompt", "a dog", "--n", 1, "--model", tiny_model_file, *QUICK]
    sample(monkeypatch, *options, "--out", "plain")
    sample(monkeypatch, *options, "--out", "over", "--init_image", "photo.png", "--strength", 0.5)
    assert pixels(Path("over/000-a-dog-23.png")) != pixels(Path("plain/000-a-dog-23.png"))
    with Image.open("over/000-a-dog-23.png") as picture:
        assert picture.size == (16, 16) and "Denoising strength: 0.5" in picture.text["parameters"]
        assert json.loads(picture.text["dreambooth"])["init_image"] == "photo.png"


def test_a_vae_is_swapped(workdir, tiny_networks, tiny_model_file, monkeypatch):
    vae = {name: (x * 1.1).contiguous() for name, x in tiny_networks["vae"].state_dict().items()}
    save_file(vae, "vae.safetensors")
    options = ["--prompt", "a dog", "--n", 1, "--model", tiny_model_file, *QUICK]
    sample(monkeypatch, *options, "--out", "own")
    sample(monkeypatch, *options, "--out", "swapped", "--vae", "vae.safetensors")
    assert pixels(Path("own/000-a-dog-23.png")) != pixels(Path("swapped/000-a-dog-23.png"))
    with Image.open("swapped/000-a-dog-23.png") as picture:
        about = json.loads(picture.text["dreambooth"])
    assert (about["vae"], about["vae_hash"]) == ("vae.safetensors", file_hash("vae.safetensors"))


def test_an_embedding_that_no_prompt_names_is_an_error(workdir, tiny_model_file, monkeypatch, capsys):
    save_file({"emb_params": torch.ones(2, 32)}, "art.safetensors")
    options = ["--n", 1, "--model", tiny_model_file, "--embedding", "art.safetensors", *QUICK]
    with pytest.raises(SystemExit):
        sample(monkeypatch, "--prompt", "an artist", "a dog", *options)
    assert "No prompt has the word of this embedding, `art`" in capsys.readouterr().err
    assert [path.name for path in workdir.iterdir() if path.is_dir()] == []
    sample(monkeypatch, "--prompt", "Art", *options, "--out", "a")
    sample(monkeypatch, "--prompt", "a dog", *options, "--negative_prompt", "art", "--out", "b")
    assert Path("a/000-art-23.png").exists() and Path("b/000-a-dog-23.png").exists()


def test_the_base_guides_and_is_named(
    workdir, tiny_networks, tiny_config, tiny_model_file, monkeypatch, capsys
):
    """A run's model beside the base that it was tuned from; in a base of another schedule it has none."""
    with torch.no_grad():
        for parameter in tiny_networks["unet"].parameters():
            parameter *= 1.1
    parts = {part: network.state_dict() for part, network in tiny_networks.items()}
    Path("logs/tuned").mkdir(parents=True)
    other = tiny_config | {"process": tiny_config["process"] | {"linear_end": 0.02}}
    for path, config in (("logs/tuned/model", tiny_config), ("other", other)):
        metadata = {"ldm.config": json.dumps(config)}
        save_model(f"{path}.safetensors", parts, alphas_cumprod=None, metadata=metadata)
    options = ["--prompt", "a dog", "--n", 1, "--model", "logs/tuned", *QUICK]
    sample(monkeypatch, *options, "--out", "plain")
    sample(monkeypatch, *options, "--out", "guided", "--guidance_base", tiny_model_file)
    assert pixels(Path("plain/000-a-dog-23.png")) != pixels(Path("guided/000-a-dog-23.png"))
    with Image.open("guided/000-a-dog-23.png") as picture:
        about = json.loads(picture.text["dreambooth"])
    assert (about["model"], about["guidance_base"]) == ("tuned", "tiny")
    assert about["guidance_base_hash"] == file_hash(tiny_model_file)
    with pytest.raises(SystemExit):
        sample(monkeypatch, *options, "--guidance_base", "other.safetensors")
    assert (
        "The guidance base does not fit the model, it has another noise schedule" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt", "a dog"], "no finished run under logs/"),
        (["--model", "MODEL"], "nothing to generate"),
        (["--prompt", "a dog", "--model", "absent.safetensors"], "no such model file"),
        (["--prompts", "absent.txt", "--model", "MODEL"], "absent.txt"),
        (["--prompt", "a dog", "--model", "MODEL", "--height", "17"], "Use 16 or 20"),
        (["--prompt", "a dog", "--model", "MODEL", "--steps", "0"], "1 to 1000"),
        (["--prompt", "a dog", "--model", "MODEL", "--n", "0"], "nothing to generate"),
        (["--prompt", "a dog", "--model", "MODEL", "--batch_size", "0"], "batch_size 0"),
        (
            ["--prompt", "a dog", "--model", "MODEL", "--config", "empty.yaml"],
            "lacks unet",
        ),
        (["--prompt", "a dog", "--model", "MODEL", "--device", "toaster"], "toaster"),
        (["--prompts", "dreambooth-live", "--model", "MODEL"], "Give identifier"),
        (["--prompt", "a dog", "--model", "MODEL", "--init_image", "absent.png"], "absent.png"),
    ],
)
def test_errors_are_one_line_and_exit_2(workdir, tiny_model_file, monkeypatch, capsys, arguments, message):
    Path("empty.yaml").write_text("model: {}\n")
    arguments = [str(tiny_model_file) if a == "MODEL" else a for a in arguments]
    before = sorted(workdir.iterdir())
    with pytest.raises(SystemExit) as stop:
        sample(monkeypatch, *arguments)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(error) == 1 and message in error[0]
    assert sorted(workdir.iterdir()) == before  # no empty folder is left


def test_runs_from_any_folder(workdir):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), "--prompt", "a dog"], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 2 and ended.stderr.startswith("error: There is no finished run")
