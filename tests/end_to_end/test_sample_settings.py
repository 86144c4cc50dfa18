"""The PNGs of sample.py say every option that changes an image, and the content of each file."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from ldm.checkpoints.save import save_model
from ldm.commands.sample import SIZES, main, parse

TOLD_ELSEWHERE = {"help", "prompt", "prompts", "identifier", "class_word", "model", "lora", "guidance_base"}
UNCHANGED = {"n", "batch_size", "low_memory", "device", "out", "allow"}  # images differ by rounding at most
OPTIONS = {
    "negative_prompt": "blur",
    "seed": 3,
    "steps": 1,
    "guidance_scale": 2,
    "sampler": "euler",
    "spacing": "trailing",
    "eta": 0.5,
    "height": 24,
    "width": 24,
    "precision": "bf16",
    "long_prompts": None,
    "clip_skip": 2,
    "init_image": "photo.png",
    "embedding": "art.safetensors",
    "vae": "vae.safetensors",
    "config": "own.yaml",
}
PLAIN = {"steps": 2, "height": 16, "width": 16, "device": "cpu", "n": 1}


def said(model: Path, **options: object) -> dict:
    """What the PNG says of an image of these options."""
    given = {"out": f"drawn{len(list(Path().iterdir()))}"} | PLAIN | options
    words = [[f"--{name}", *([] if value is None else [str(value)])] for name, value in given.items()]
    main(parse(["--prompt", "an art dog", "--model", str(model), *(word for pair in words for word in pair)]))
    (file,) = Path(given["out"]).glob("000-*.png")
    with Image.open(file) as image:
        return json.loads(image.text["dreambooth"])


@pytest.fixture
def files(workdir: Path, tiny_networks: dict[str, nn.Module], tiny_config: dict) -> None:
    write_files(tiny_networks, tiny_config, factor=1.0)


def write_files(networks: dict[str, nn.Module], config: dict, *, factor: float) -> None:
    """The files that options name; another factor changes what is in each."""
    Image.new("RGB", (20, 20), (int(100 * factor), 0, 0)).save("photo.png")
    save_file({"emb_params": factor * torch.ones(2, 32)}, "art.safetensors")
    vae = {name: (x * factor).contiguous() for name, x in networks["vae"].state_dict().items()}
    save_file(vae, "vae.safetensors")
    process = config["process"] | {"linear_end": 0.012 * factor}
    Path("own.yaml").write_text(json.dumps({"model": {"params": config | {"process": process}}}))


def test_every_option_that_changes_an_image_is_in_its_png(files, tiny_model_file):
    plain = said(tiny_model_file)
    assert plain == said(tiny_model_file, low_memory=None, batch_size=1)
    for name, value in OPTIONS.items():
        assert said(tiny_model_file, **{name: value}) != plain, name
    known = set(vars(parse([])))
    assert known | {"help"} == {*OPTIONS, "strength", *SIZES, *TOLD_ELSEWHERE, *UNCHANGED}


def test_another_file_of_the_same_name_is_told_apart(files, tiny_model_file, tiny_networks, tiny_config):
    named = {name: OPTIONS[name] for name in ("init_image", "embedding", "vae", "config")}
    before = {name: said(tiny_model_file, **{name: value}) for name, value in named.items()}
    write_files(tiny_networks, tiny_config, factor=1.1)
    for name, value in named.items():
        assert said(tiny_model_file, **{name: value}) != before[name], name


def test_a_clip_skip_is_told_where_it_or_the_model_s_own_is_not_1(workdir, tiny_networks, tiny_config):
    tiny_config["text_encoder"]["params"]["clip_skip"] = 2
    state_dicts = {name: network.state_dict() for name, network in tiny_networks.items()}
    metadata = {"ldm.config": json.dumps(tiny_config)}
    path = save_model("skips.safetensors", state_dicts, alphas_cumprod=None, metadata=metadata)
    assert said(path)["clip_skip"] == 2 and said(path, clip_skip=1)["clip_skip"] == 1
