"""The key table: names of released files, both ways, and what is computed rather than stored."""

import logging

import numpy as np
import pytest
import torch

from ldm.checkpoints.layout import choose_ema, describe, join, schedule_buffers, split
from ldm.config import instantiate
from ldm.errors import UserError
from ldm.families.shapes import CLIP_UNUSED
from tests.checkpoints import sd_v1

TEXT = "cond_stage_model.transformer.text_model."


@pytest.fixture
def released() -> dict[str, torch.Tensor]:
    """Every name of an SD v1 file, each with a tensor of its own; the position table has 77 rows."""
    tensors = {name: torch.full((1,), float(k)) for k, name in enumerate(sorted(sd_v1.names()))}
    return tensors | {TEXT + "embeddings.position_embedding.weight": torch.rand(77, 2)}


def alphas() -> np.ndarray:
    """SD's schedule in float64, apart from the library."""
    return np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def test_released_names_are_counted():
    assert len(sd_v1.names()) == 1143


def test_split_then_join_gives_every_name_back(released):
    parts = split(released)
    assert {part: len(tensors) for part, tensors in parts.items()} == {
        "unet": 686,
        "vae": 248,
        "text_encoder": 196,
    }
    joined = join(parts, torch.from_numpy(alphas()))
    assert joined.keys() == sd_v1.names()
    computed = {*sd_v1.SCHEDULE, TEXT + "embeddings.position_ids"}
    assert all(joined[name] is released[name] for name in joined.keys() - computed)


def test_true_size_networks_have_the_names_of_a_released_file():
    targets = {
        "unet": "ldm.models.unet.UNetModel",
        "vae": "ldm.models.autoencoder.AutoencoderKL",
        "text_encoder": "ldm.models.text_encoder.CLIPTextEncoder",
    }
    with torch.device("meta"):
        parts = {part: instantiate({"target": target}).state_dict() for part, target in targets.items()}
    joined = join(parts, torch.from_numpy(alphas()))
    assert joined.keys() == sd_v1.names()
    sizes = {part: sum(tensor.numel() for tensor in tensors.values()) for part, tensors in parts.items()}
    assert sizes == {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}


def test_text_names_without_their_middle_are_accepted(released):
    old = {
        name.replace("transformer.text_model.", "transformer."): tensor for name, tensor in released.items()
    }
    assert old.keys() != released.keys()
    assert split(old)["text_encoder"] == split(released)["text_encoder"]


def test_what_only_training_needed_is_left_out(released, caplog):
    extra = {
        "model_ema.decay": torch.ones(()),
        "model_ema.diffusion_modelout2bias": torch.ones(4),
        "first_stage_model.loss.logvar": torch.ones(()),
        "first_stage_model.model_ema.decay": torch.ones(()),
    }
    with caplog.at_level(logging.WARNING):
        assert split(released | extra) == split(released)
        assert not caplog.records
        split(released | {"embedding_manager.x": torch.ones(1)})
    assert "embedding_manager.x" in caplog.text


@pytest.mark.parametrize("name", CLIP_UNUSED)
def test_the_other_half_of_clip_is_left_out(released, name):
    """As ComfyUI's savers and merging tools leave it."""
    more = {f"cond_stage_model.{name}": torch.ones(4, 4)}
    assert split(released | more) == split(released)


def test_a_whole_model_beside_its_textual_inversion_is_a_model(released, caplog):
    names = ("string_to_param_dict.*", "initial_embeddings.*", "string_to_token_dict.*")
    beside = {f"embedding_manager.{name}": torch.ones(2, 4) for name in names}
    assert describe(released | beside) is None
    assert split(released | beside) == split(released)
    assert describe({"string_to_param.*": torch.ones(2, 4)}) == "a textual inversion embedding"


@pytest.mark.parametrize("tokens", [77, 24])
def test_position_ids_follow_the_position_table(tokens):
    name = "transformer.text_model.embeddings.position_embedding.weight"
    joined = join({"text_encoder": {name: torch.zeros(tokens, 8)}})
    ids = joined[TEXT + "embeddings.position_ids"]
    assert ids.dtype == torch.int64 and torch.equal(ids, torch.arange(tokens)[None])


def test_without_text_encoder_or_schedule_nothing_is_added():
    joined = join({"vae": {"quant_conv.bias": torch.zeros(1)}})
    assert joined.keys() == {"first_stage_model.quant_conv.bias"}


def test_schedule_buffers_are_those_of_a_released_file():
    """Recomputed here from the betas, as latent-diffusion registers them."""
    ac, betas = alphas(), np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    previous = np.append(1.0, ac[:-1])
    variance = betas * (1 - previous) / (1 - ac)
    expected = {
        "betas": betas,
        "alphas_cumprod": ac,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": np.sqrt(ac),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - ac),
        "log_one_minus_alphas_cumprod": np.log(1 - ac),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / ac),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / ac - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(previous) / (1 - ac),
        "posterior_mean_coef2": (1 - previous) * np.sqrt(1 - betas) / (1 - ac),
    }
    exact = schedule_buffers(torch.from_numpy(ac))
    rounded = schedule_buffers(torch.from_numpy(ac).float())  # a file's own float32 loses digits of 1 - ac
    assert exact.keys() == rounded.keys() == expected.keys() == set(sd_v1.SCHEDULE)
    for name, values in expected.items():
        assert exact[name].dtype == torch.float32
        np.testing.assert_allclose(exact[name], values, rtol=2e-7, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(rounded[name], values, rtol=3e-4, atol=1e-12, err_msg=name)
    assert exact["alphas_cumprod"][[0, 499, 999]].tolist() == pytest.approx(
        [0.99915, 0.2776697, 0.0046601], rel=1e-5
    )


def test_averaged_weights_take_the_place_of_the_raw(released):
    average = "model_ema.diffusion_modelinput_blocks11transformer_blocks0attn2to_kweight"
    averages = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor + 0.5
        for name, tensor in released.items()
        if name.startswith("model.diffusion_model.")
    }
    assert average in averages and len(averages) == 686
    raw, chosen = split(released), split(choose_ema(released | averages))
    assert all(torch.equal(chosen["unet"][name], raw["unet"][name] + 0.5) for name in raw["unet"])
    assert chosen["vae"] == raw["vae"] and chosen["text_encoder"] == raw["text_encoder"]
    del averages[average]
    with pytest.raises(UserError, match="1 of 686"):
        choose_ema(released | averages)
    with pytest.raises(UserError, match="686 of 686"):
        choose_ema(released)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("model.diffusion_model.out.2.bias", None),
        ("first_stage_model.quant_conv.bias", None),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "a LoRA"),
        ("unet.down_blocks.0.attn1.to_k.lora_A.weight", "a LoRA"),
        ("encoder.down.0.block.0.norm1.weight", "an autoencoder (VAE) alone"),
        ("conditioner.embedders.0.transformer.x", "text encoders alone"),
        ("down_blocks.0.resnets.0.norm1.weight", "one network of a diffusers folder"),
        ("text_model.final_layer_norm.bias", "a text encoder alone"),
        ("fc.weight", "something else"),
    ],
)
def test_other_files_are_recognised(name, what):
    assert describe([name, "global_step"]) == what
