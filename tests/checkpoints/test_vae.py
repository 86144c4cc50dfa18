"""A VAE by itself, as people swap them, in LDM's and diffusers' names: sampling, converting, training."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.checkpoints import diffusers_names
from ldm.checkpoints.load import open_model
from ldm.checkpoints.save import save_model
from ldm.checkpoints.save_folder import save_folder
from ldm.checkpoints.vae import open_vae
from ldm.commands import convert
from ldm.config import instantiate
from ldm.errors import UserError
from ldm.model_file import ModelFile
from ldm.pipeline import Text2Image
from ldm.runs.inputs import base_hash
from ldm.runs.run import base_files, load_base
from ldm.schema import RunConfig, TrainerOptions


@pytest.fixture
def vae(tiny_config: dict) -> dict[str, Tensor]:
    """The weights of another VAE of the same size."""
    torch.manual_seed(9)
    return {name: x.contiguous() for name, x in instantiate(tiny_config["vae"]).state_dict().items()}


def files_of(**base: object) -> dict[str, Path]:
    """The base files of a run's config."""
    nodes = {"model": {"target": ""}, "data": {"target": ""}}
    return base_files(RunConfig(name="run", seed=0, trainer=TrainerOptions(max_steps=1), **nodes, **base))


def in_ldm_names(vae: dict[str, Tensor], folder: Path, **_) -> Path:
    save_file(vae, folder / "vae.safetensors")
    return folder / "vae.safetensors"


def as_ldm_trained_it(vae: dict[str, Tensor], folder: Path, **_) -> Path:
    """With the discriminator and the averages of its training, which no decoder needs."""
    rest = {"loss.discriminator.main.0.weight": torch.ones(2), "model_ema.decay": torch.tensor(0.9)}
    rest |= {"model_ema.decoderconv_inweight": torch.ones(1)}
    torch.save({"state_dict": vae | rest, "epoch": 3}, folder / "vae.ckpt")
    return folder / "vae.ckpt"


def under_a_model_s_prefix(vae: dict[str, Tensor], folder: Path, **_) -> Path:
    save_file({f"first_stage_model.{name}": x for name, x in vae.items()}, folder / "vae.safetensors")
    return folder / "vae.safetensors"


def wrapped(vae: dict[str, Tensor], folder: Path, **_) -> Path:
    torch.save(
        {"state_dict": {"state_dict": {f"module.{name}": x for name, x in vae.items()}}}, folder / "v.pt"
    )
    return folder / "v.pt"


def in_diffusers_names(vae: dict[str, Tensor], folder: Path, **_) -> Path:
    table = diffusers_names.autoencoder_table({"ch_mult": [1, 2], "num_res_blocks": 1})
    renamed = diffusers_names.rename(diffusers_names.reshape_vae_attention(vae, dims=2), table)
    save_file({name: renamed[name].contiguous() for name in renamed}, folder / "vae.safetensors")
    return folder / "vae.safetensors"


def diffusers_pipeline(vae: dict[str, Tensor], folder: Path, *, model: Path, tokenizer: Path) -> Path:
    opened = open_model(model)
    state_dicts = {**opened.state_dicts, "vae": vae}
    return save_folder(folder / "whole", state_dicts, config=opened.config, tokenizer=tokenizer, size=16)


def diffusers_folder(vae: dict[str, Tensor], folder: Path, **how: Path) -> Path:
    return diffusers_pipeline(vae, folder, **how) / "vae"


def another_model(vae: dict[str, Tensor], folder: Path, *, model: Path, **_) -> Path:
    tensors = load_file(model) | {f"first_stage_model.{name}": x for name, x in vae.items()}
    save_file(tensors, folder / "other.safetensors")
    return folder / "other.safetensors"


FORMS = [
    in_ldm_names,
    as_ldm_trained_it,
    under_a_model_s_prefix,
    wrapped,
    in_diffusers_names,
    diffusers_pipeline,
    diffusers_folder,
    another_model,
]


def assert_equal(network: nn.Module, expected: dict[str, Tensor]) -> None:
    found = network.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("form", FORMS)
def test_it_replaces_the_model_s_own(form, vae, tiny_model_file, tiny_tokenizer, tiny_networks, tmp_path):
    file = form(vae, tmp_path, model=tiny_model_file, tokenizer=tiny_tokenizer)
    opened = ModelFile(tiny_model_file, vae=file)
    opened.fill()
    assert_equal(opened.networks["vae"], vae)
    assert_equal(opened.networks["unet"], tiny_networks["unet"].state_dict())
    assert opened.networks["vae"].scale_factor == 0.18215


@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_base_of_a_training(form, vae, tiny_model_file, tiny_tokenizer, tiny_networks, tmp_path):
    """Beside `base_checkpoint`, which then has the other networks alone."""
    file = form(vae, tmp_path, model=tiny_model_file, tokenizer=tiny_tokenizer)
    torch.manual_seed(5)
    networks = {name: network for name, network in tiny_networks.items()}
    unet = {name: x.clone() for name, x in networks["unet"].state_dict().items()}
    for network in networks.values():
        for parameter in network.parameters():
            nn.init.normal_(parameter)
    checkpoint = str(tiny_model_file)
    with_vae = load_base(networks, files_of(base_checkpoint=checkpoint, base_parts={"vae": str(file)}))
    assert_equal(networks["vae"], vae)
    assert_equal(networks["unet"], unet)
    assert with_vae != load_base(networks, files_of(base_checkpoint=checkpoint))


def test_a_base_is_named_by_what_is_taken_from_each_file(tiny_model_file, tiny_networks):
    """The UNet of a file is another base than its VAE, for prior images and cached latents too."""
    named = [("unet",), ("vae",), ("text_encoder",), ("unet", "vae"), ("all",)]
    hashes = [load_base(tiny_networks, dict.fromkeys(parts, tiny_model_file)) for parts in named]
    assert len(set(hashes)) == len(named) and hashes[-1] == base_hash(tiny_model_file)


def without_vae(model: Path, folder: Path) -> Path:
    tensors = {name: x for name, x in load_file(model).items() if not name.startswith("first_stage_model.")}
    metadata = {"ldm.config": json.dumps(open_model(model).config)}
    save_file(tensors, folder / "without.safetensors", metadata=metadata)
    return folder / "without.safetensors"


def test_it_completes_a_model_without_one(vae, tiny_model_file, tmp_path):
    model = without_vae(tiny_model_file, tmp_path)
    for words in ([], ["--dtype", "fp16"]):
        with pytest.raises(UserError, match="its vae lacks.*--vae FILE"):
            convert.main(convert.parse([str(model), str(tmp_path / "out.safetensors"), *words]))
    with pytest.raises(UserError, match="its vae lacks.*--vae FILE"):
        Text2Image.from_file(model)
    file = in_ldm_names(vae, tmp_path)
    assert_equal(Text2Image.from_file(model, vae=file).vae, vae)
    whole = convert.main(convert.parse([str(model), str(tmp_path / "whole.ckpt"), "--vae", str(file)]))
    assert_equal(Text2Image.from_file(whole).vae, vae)
    folder = convert.main(convert.parse([str(model), str(tmp_path / "folder"), "--vae", str(file)]))
    assert_equal(Text2Image.from_file(folder).vae, vae)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda vae: {f"text_model.{name}": x for name, x in vae.items()}, "There is no VAE in it"),
        (lambda vae: {"taesd_decoder.layers.0.weight": torch.ones(1)}, "There is no VAE in it"),
        (lambda vae: vae | {"decoder.conv_in.weight": torch.ones(64, 16, 3, 3)}, "16 latent channels"),
        (lambda vae: {k: x for k, x in vae.items() if "encoder" not in k}, "whole model: its vae lacks"),
        (lambda vae: vae | {"decoder.conv_out.bias": torch.ones(7)}, r"1 of another shape \(decoder"),
        (lambda vae: vae | {"decoder.conv_out.bias": torch.ones(3, dtype=torch.int8)}, "floating-point"),
    ],
)
def test_what_is_no_vae_of_this_family(change, message, vae, tiny_model_file, tmp_path):
    save_file(change(vae), tmp_path / "vae.safetensors")
    with pytest.raises(UserError, match=message):
        ModelFile(tiny_model_file, vae=tmp_path / "vae.safetensors")


def test_a_vae_of_another_scale_is_refused(vae, tiny_model_file, tiny_tokenizer, tmp_path):
    folder = diffusers_folder(vae, tmp_path, model=tiny_model_file, tokenizer=tiny_tokenizer)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.13025}))
    with pytest.raises(UserError, match=r"scales its latents by 0\.13025, the model's by 0\.18215"):
        ModelFile(tiny_model_file, vae=folder)


def test_a_vae_alone_in_our_own_format(vae, tiny_config, tmp_path):
    metadata = {"ldm.config": json.dumps({"vae": tiny_config["vae"]})}
    file = save_model(tmp_path / "vae.safetensors", {"vae": vae}, alphas_cumprod=None, metadata=metadata)
    tensors, node = open_vae(file)
    assert tensors.keys() == vae.keys() and node == tiny_config["vae"]
