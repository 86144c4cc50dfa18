"""LoHa and LoKr files of ours and of the LyCORIS library: read back, and predicting what the library does."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from ldm.checkpoints.load import open_model
from ldm.checkpoints.lora import merge_lora, read_lora
from ldm.checkpoints.products import product_weights
from ldm.commands import convert
from ldm.errors import UserError
from ldm.model_file import ModelFile
from ldm.models.lora import lora_off
from tests.families import tiny_sdxl
from tests.families.conftest import xl_folder  # noqa: F401
from tests.families.test_sdxl_lora import furthest, predicted, predicted_by_diffusers
from tests.models.test_adapter import build, randomized
from tests.parity.conftest import TOLERANCE, ours, relative, theirs
from tests.parity.test_lycoris import EVERY_LAYER, filled, kohya, wrapper

WAYS = {  # of the library, each far from its start
    "loha": {"algo": "loha"},
    "loha of another rank in convolutions": {"algo": "loha", "conv_dim": 2, "conv_alpha": 3},
    "loha, Tucker": {"algo": "loha", "use_tucker": True},
    "loha, rank-stabilized, with a scalar": {"algo": "loha", "rs_lora": True, "use_scalar": True},
    "lokr": {"algo": "lokr", "factor": 4},
    "lokr of an even split": {"algo": "lokr"},
    "lokr of whole matrices": {"algo": "lokr", "full_matrix": True},
    "lokr, both decomposed": {"algo": "lokr", "decompose_both": True, "factor": 16},
    "lokr, Tucker": {"algo": "lokr", "factor": 2, "use_tucker": True},
    "lokr, the large factor first": {"algo": "lokr", "factor": 4, "unbalanced_factorization": True},
}


def trained_by_lycoris(text_encoders: object, pipe: object, file: Path, **how: object) -> Path:
    """A file by the library, which then predicts in `pipe` with what it saved, by its forward.

    Its merging multiplies by alpha / rank twice.
    """
    preset = file.with_suffix(".toml")
    preset.write_text(EVERY_LAYER)
    how |= {"preset": str(preset), "warn_on_unmatched": False}
    network = kohya.create_network(1.0, 4, 2, pipe.vae, text_encoders, pipe.unet, **how)
    network.apply_to(text_encoders, pipe.unet, True, True)
    filled(network).requires_grad_(False).save_weights(str(file), torch.float32, {})
    return file


@pytest.mark.parametrize("way", WAYS)
def test_the_prediction_is_the_librarys(
    way: str, pipe: StableDiffusionPipeline, tiny_model_file: Path, tmp_path: Path
):
    plain = theirs(pipe)
    file = trained_by_lycoris(pipe.text_encoder, pipe, tmp_path / "x.safetensors", **WAYS[way])
    names = {name.rpartition(".")[2] for name in load_file(file)}
    assert any(name.startswith(("hada_w", "lokr_w")) for name in names)
    if "Tucker" in way:
        assert names & {"hada_t1", "lokr_t2"}
    expected = theirs(pipe)
    assert relative(ours(tiny_model_file, file), expected) < TOLERANCE
    assert relative(plain, expected) > 100 * TOLERANCE


def test_sdxl(xl_folder: Path, tmp_path: Path):  # noqa: F811
    pipe = StableDiffusionXLPipeline.from_pretrained(xl_folder, add_watermarker=False)
    encoders = [pipe.text_encoder, pipe.text_encoder_2]
    file = trained_by_lycoris(encoders, pipe, tmp_path / "x.safetensors", **WAYS["loha"])
    assert {name[:9] for name in load_file(file)} == {"lora_unet", "lora_te1_", "lora_te2_"}
    expected = predicted_by_diffusers(pipe)
    assert furthest(predicted(xl_folder, file), expected) <= TOLERANCE
    assert furthest(predicted(xl_folder, None), expected) > 100 * TOLERANCE


def test_the_wrapper_of_any_module_names_no_network(xl_folder: Path, tmp_path: Path):  # noqa: F811
    """SDXL's text encoders share the names of their layers: the widths tell them apart."""
    pipe = StableDiffusionXLPipeline.from_pretrained(xl_folder, add_watermarker=False)
    how = {"linear_dim": 4, "linear_alpha": 2, "algo": "lokr", "factor": 4, "warn_on_unmatched": False}
    network = wrapper.create_lycoris(pipe.text_encoder_2, 1.0, **how)
    network.apply_to()
    for own in filled(network).requires_grad_(False).loras:
        if own.lora_name.endswith("text_projection"):  # which SD's names have as no layer
            own.lokr_w1.zero_()
    network.save_weights(str(tmp_path / "all.safetensors"), torch.float32, {})
    tensors = load_file(tmp_path / "all.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "text_projection" not in name}
    save_file(kept, tmp_path / "x.safetensors")
    expected = predicted_by_diffusers(pipe)
    assert furthest(predicted(xl_folder, tmp_path / "x.safetensors"), expected) <= TOLERANCE
    assert furthest(predicted(xl_folder, None), expected) > 100 * TOLERANCE


@pytest.mark.parametrize(("kind", "family"), [("loha", "sd"), ("lokr", "sdxl")])
def test_our_own_file_is_read_back(
    kind: str,
    family: str,
    tiny_config: dict,
    tiny_networks: dict[str, nn.Module],
    tiny_model_file: Path,
    xl_folder: Path,  # noqa: F811
    tmp_path: Path,
):
    """Merged, and beside its layers, where it can be off."""
    config, networks, base = tiny_config, tiny_networks, tiny_model_file
    if family == "sdxl":
        config, networks = tiny_sdxl.model_section(xl_folder), tiny_sdxl.networks(xl_folder)
        base = xl_folder
    module = randomized(build(config, networks, kind))
    about = {"metadata": {"ldm.config": json.dumps(config)}, "dtype": torch.float32}
    model = module.export(tmp_path / "run" / "model.safetensors", **about)
    lora = tmp_path / "run" / "loras" / "run.safetensors"
    added, plain, merged = ModelFile(base), ModelFile(base), ModelFile(model)
    added.fill(loras=[(lora, 1.0)])
    plain.fill()
    merged.fill()
    before, expected, got = (
        {(n, key): x for n, network in file.networks.items() for key, x in network.state_dict().items()}
        for file in (plain, merged, added)
    )
    for key, tensor in expected.items():
        torch.testing.assert_close(got[key], tensor, rtol=1e-5, atol=1e-6)
    changed = {key for key, x in expected.items() if not torch.allclose(before[key], x, rtol=1e-2, atol=1e-3)}
    assert changed == {(name, f"{layer}.weight") for name, layer in module.lora.adapted()}
    (beside,) = plain.attach([(lora, 1.0)])
    for name, layer in module.lora.adapted():
        own, other = (file.networks[name].get_submodule(layer) for file in (plain, merged))
        x = torch.randn(2, other.weight.shape[1], *[5] * (other.weight.ndim - 2))
        torch.testing.assert_close(own(x), other(x), rtol=1e-4, atol=1e-4)
        with lora_off(beside):
            assert torch.equal(own(x), type(own).forward(own, x))


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_half_of_it_is_half_its_change(
    kind: str, tiny_config: dict, tiny_networks: dict, tiny_model_file: Path, tmp_path: Path
):
    module = randomized(build(tiny_config, tiny_networks, kind))
    module.export(tmp_path / "run" / "model.safetensors", dtype=torch.float32, metadata={})
    state_dicts = open_model(tiny_model_file).state_dicts
    layers = read_lora(tmp_path / "run" / "loras" / "run.safetensors", state_dicts)
    half, whole = (merge_lora(state_dicts, layers, weight=weight)["unet"] for weight in (0.5, 1.0))
    for layer in layers["unet"]:
        name = f"{layer}.weight"
        base = state_dicts["unet"][name]
        torch.testing.assert_close(half[name] - base, 0.5 * (whole[name] - base), rtol=1e-4, atol=1e-6)


def test_it_is_merged_by_convert(pipe: StableDiffusionPipeline, tiny_model_file: Path, tmp_path: Path):
    file = trained_by_lycoris(pipe.text_encoder, pipe, tmp_path / "x.safetensors", **WAYS["lokr"])
    words = [str(tiny_model_file), str(tmp_path / "out.safetensors"), "--lora", str(file), "--dtype", "fp32"]
    out = convert.main(convert.parse(words))
    assert relative(ours(out, None), theirs(pipe)) < TOLERANCE


LAYER = "lora_unet_mid_block_attentions_0_proj_in"  # [64, 64, 1, 1] in the tiny model
FACTORS = {f"hada_w{i}_{end}": (64, 2) if end == "a" else (2, 64) for i in (1, 2) for end in "ab"}
SPOILT: dict[str, tuple[Callable[[dict], dict], str]] = {
    "a factor is missing": (lambda x: {n: t for n, t in x.items() if n != "hada_w2_b"}, "has no hada_w2_b"),
    "another width": (
        lambda x: x | {"hada_w1_b": torch.ones(2, 32)},
        r"takes \[64, 64, 1, 1\]; not.*\[2, 32\]",
    ),
    "ranks that differ": (
        lambda x: x | {"hada_w2_a": torch.ones(64, 3), "hada_w2_b": torch.ones(3, 64)},
        "takes",
    ),
    "rank 0": (lambda x: {n: t[:, :0] if n.endswith("a") else t[:0] for n, t in x.items()}, "takes"),
    "a number": (lambda x: x | {"hada_w1_a": torch.tensor(1.0)}, "takes"),
    "whole numbers": (
        lambda x: x | {"hada_w1_a": torch.ones(64, 2, dtype=torch.int64)},
        "not of floating-point",
    ),
    "alpha is no number": (lambda x: x | {"alpha": torch.tensor(float("nan"))}, "alpha of .* is no number"),
    "both kinds": (lambda x: x | {"lokr_w1": torch.ones(2, 2)}, "has a `lokr_w1` beside `hada_w1_a`"),
    "and a LoRA": (lambda x: x | {"lora_up.weight": torch.ones(64, 2)}, "has a `up` beside `hada_w1_a`"),
    "weight-decomposed": (
        lambda x: x | {"dora_scale": torch.ones(64, 1, 1, 1)},
        "This is a DoRA, not a plain LoRA",
    ),
    "a LoKr with one matrix": (lambda x: {"lokr_w1": torch.ones(8, 8)}, "has no lokr_w2_a"),
    "a LoKr twice": (
        lambda x: {"lokr_w1": torch.ones(8, 8), "lokr_w2": torch.ones(8, 8), "lokr_w2_a": torch.ones(8, 2)},
        "has a `lokr_w2_a` beside `lokr_w1`",
    ),
    "a huge LoKr": (
        lambda x: {"lokr_w1": torch.ones(1000, 1000), "lokr_w2": torch.ones(1000, 1000)},
        "takes",
    ),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_what_does_not_fit_is_refused(fault: str, tiny_model_file: Path, tmp_path: Path):
    change, message = SPOILT[fault]
    tensors = change({name: torch.ones(shape) for name, shape in FACTORS.items()})
    named = {f"{LAYER}.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=f"{message}.*x.safetensors|x.safetensors.*{message}"):
        read_lora(tmp_path / "x.safetensors", open_model(tiny_model_file).state_dicts)


def test_without_an_alpha_the_scale_is_1():
    own = {name: torch.ones(shape) for name, shape in FACTORS.items()}
    read = product_weights(own, torch.zeros(64, 64, 1, 1), "x", None, where="x")
    assert (read.alpha, read.rank) == (2.0, 2)
