"""Guidance whose unconditional prediction is the base's: the mix by hand, and LoRA factors that are off."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.checkpoints.load import file_hash
from ldm.checkpoints.lora import save_lora
from ldm.checkpoints.save import save_model
from ldm.denoiser import Denoiser
from ldm.diffusion.process import DiscreteDiffusion
from ldm.diffusion.samplers import transfer
from ldm.diffusion.schedule import make_alphas_cumprod
from ldm.errors import UserError
from ldm.models.conditioning import Conditioning
from ldm.models.lora import LoRA, lora_off
from ldm.pipeline import Sample, Text2Image
from ldm.runs.sampling import base_denoiser, text2image
from tests.factories import build_module

PROCESS = DiscreteDiffusion(make_alphas_cumprod())
PROMPTS = ["a dog", "a red cat", "a dog", "a car", "a dog"]
SEEDS = [0, 1, 2, 3, 4]
SMALL = {"steps": 3, "height": 16, "width": 24, "negative_prompt": "blur"}
NEAR = {"rtol": 1e-4, "atol": 1e-4}


def latents(samples: list[Sample]) -> torch.Tensor:
    return torch.stack([sample.latents for sample in samples])


def moved(networks: dict[str, nn.Module], seed: int = 1) -> dict[str, nn.Module]:
    """Copies with other weights, as training would leave them."""
    draws, copies = torch.Generator().manual_seed(seed), copy.deepcopy(networks)
    with torch.no_grad():
        for parameter in (p for network in copies.values() for p in network.parameters()):
            parameter += 0.03 * torch.randn(parameter.shape, generator=draws)
    return copies


def denoiser(networks: dict[str, nn.Module], **options) -> Denoiser:
    return Denoiser(networks["unet"], networks["text_encoder"], **{"process": PROCESS} | options)


def pipeline(networks: dict[str, nn.Module], base: Denoiser | None = None, **options) -> Text2Image:
    options = {"process": PROCESS, "default_size": 16} | options
    return Text2Image(**networks, guidance_base=base, **options)


def with_factors(networks: dict[str, nn.Module]) -> LoRA:
    """A LoRA of large factors beside the networks' layers."""
    lora, draws = LoRA(rank=2, unet=("attention", "convolutions"), text_encoder=("attention",)), 0
    lora.attach({name: networks[name] for name in ("unet", "text_encoder")})
    for parameter in lora.parameters():
        draws += 1
        nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(draws))
    return lora


@pytest.mark.parametrize("long_prompts", [False, True])
def test_the_model_as_its_own_base_is_plain_guidance(tiny_networks, long_prompts):
    prompts = [*PROMPTS[:4], "a dog " * 12] if long_prompts else PROMPTS
    plain, base = pipeline(tiny_networks), pipeline(tiny_networks, denoiser(copy.deepcopy(tiny_networks)))
    options = {"seeds": SEEDS, "guidance_scale": 4.0, "long_prompts": long_prompts, **SMALL}
    expected = latents(plain(prompts, **options))
    torch.testing.assert_close(latents(base(prompts, batch_size=3, **options)), expected, **NEAR)


@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_one_step_is_the_mix_of_both_predictions(tiny_networks, parameterization):
    """By hand, in eps, for a batch of two prompts: base's UNet and text encoder for the negative prompt."""
    process = DiscreteDiffusion(make_alphas_cumprod(), parameterization=parameterization)
    tuned, options = moved(tiny_networks), {"process": process}
    first, last = process.level(1), process.level(0)
    t2i = pipeline(tuned, denoiser(tiny_networks, **options), **options)
    x = t2i._noise((4, 8, 12), [7, 8], "x_T")
    drawn = t2i(["a dog", "a cat"], seeds=[7, 8], guidance_scale=3.0, **SMALL | {"steps": 1})

    @torch.no_grad()
    def eps(networks: dict[str, nn.Module], prompt: str) -> torch.Tensor:
        context = networks["text_encoder"](networks["text_encoder"].tokenize([prompt]))
        t = torch.ones(2, dtype=torch.int64)
        prediction = networks["unet"](x, t, Conditioning(context[[0, 0]]))
        return prediction if parameterization == "eps" else first.a * prediction + first.s * x

    of_base = eps(tiny_networks, "blur")
    for k, prompt in enumerate(["a dog", "a cat"]):
        mix = (of_base + 3.0 * (eps(tuned, prompt) - of_base))[k]
        by_hand = transfer(x[k], mix, first, last)
        torch.testing.assert_close(drawn[k].latents, by_hand, **NEAR)
        plain = pipeline(tuned, **options)(
            [prompt], seeds=[7 + k], guidance_scale=3.0, **SMALL | {"steps": 1}
        )
        assert (plain[0].latents - by_hand).abs().max() > 1e-3


def test_scale_1_never_asks_the_base(tiny_networks, monkeypatch):
    tuned, base = moved(tiny_networks), denoiser(tiny_networks)
    for network in base.networks:
        monkeypatch.setattr(network, "forward", lambda *_: 1 / 0)
    options = {"seeds": SEEDS, "guidance_scale": 1.0, **SMALL}
    drawn = latents(pipeline(tuned, base)(PROMPTS, **options))
    assert torch.equal(drawn, latents(pipeline(tuned)(PROMPTS, **options)))
    with pytest.raises(ZeroDivisionError):
        pipeline(tuned, base)(PROMPTS, **options | {"guidance_scale": 2.0})


def test_networks_without_a_lora_s_factors_are_their_own_base(tiny_networks):
    """No copy: to the bit what a second, untouched model gives."""
    untouched = copy.deepcopy(tiny_networks)
    lora = with_factors(tiny_networks)
    own, second = denoiser(tiny_networks, without=[lora]), denoiser(untouched)
    assert own.networks == (tiny_networks["unet"], tiny_networks["text_encoder"])
    options = {"seeds": SEEDS, "guidance_scale": 4.0, **SMALL}
    drawn = latents(pipeline(tiny_networks, own)(PROMPTS, **options))
    assert torch.equal(drawn, latents(pipeline(tiny_networks, second)(PROMPTS, **options)))
    plain = latents(pipeline(tiny_networks)(PROMPTS, **options))
    assert (plain - drawn).abs().max() > 1e-2  # the factors are on again


def test_factors_are_off_inside_alone_and_on_after_an_error(tiny_networks):
    x, t, told = torch.ones(1, 4, 8, 8), torch.tensor([9]), Conditioning(torch.ones(1, 3, 32))
    unet = tiny_networks["unet"]
    with torch.no_grad():
        bare = unet(x, t, told)
        lora = with_factors(tiny_networks)
        changed = unet(x, t, told)
        with pytest.raises(KeyError), lora_off(lora):
            assert torch.equal(unet(x, t, told), bare)
            with lora_off(lora):
                pass
            assert torch.equal(unet(x, t, told), bare)
            raise KeyError
        assert torch.equal(unet(x, t, told), changed) and not torch.equal(changed, bare)


@pytest.mark.parametrize("lora", [None, {"target": "ldm.models.lora.LoRA", "params": {"rank": 2}}])
def test_the_base_of_a_run_is_kept_while_the_run_learns(tiny_config, tiny_networks, lora):
    torch.manual_seed(0)
    module = build_module(tiny_config, trainable={"lora": lora})
    for name, network in module.networks.items():
        network.load_state_dict(tiny_networks[name].state_dict())
    base = base_denoiser(module)
    assert (base.unet is module.networks["unet"]) == (lora is not None)
    t2i = text2image(module, size=16, guidance_base=base)
    options = {"seeds": [0], "guidance_scale": 3.0, **SMALL}
    before = latents(t2i(["a dog"], **options))
    torch.testing.assert_close(before, latents(pipeline(tiny_networks)(["a dog"], **options)), **NEAR)
    with torch.no_grad():
        for part in module.trainable_modules.values():
            for parameter in part.parameters():
                parameter += 0.05
    after = latents(t2i(["a dog"], **options))
    assert (after - before).abs().max() > 1e-2
    expected = pipeline(module.networks, denoiser(tiny_networks))
    torch.testing.assert_close(after, latents(expected(["a dog"], **options)), **NEAR)


@pytest.fixture
def files(tmp_path: Path, tiny_config: dict, tiny_networks: dict) -> dict[str, Path]:
    """A base, a model tuned from it, a LoRA for the base, and bases that fit neither."""

    def save(name: str, networks: dict, **config) -> Path:
        parts = {part: network.state_dict() for part, network in networks.items()}
        process = tiny_config["process"] | config
        metadata = {"ldm.config": json.dumps(tiny_config | {"process": process})}
        path = tmp_path / f"{name}.safetensors"
        return save_model(path, parts, alphas_cumprod=None, dtype=torch.float32, metadata=metadata)

    found = {"base": save("base", tiny_networks), "tuned": save("tuned", moved(tiny_networks))}
    found["v"] = save("v", tiny_networks, parameterization="v")
    found["schedule"] = save("schedule", tiny_networks, linear_end=0.02)
    state_dicts = {part: network.state_dict() for part, network in tiny_networks.items()}
    lora = with_factors(copy.deepcopy(tiny_networks))
    found["lora"] = save_lora(tmp_path / "lora.safetensors", lora.weights(), state_dicts, dtype=torch.float32)
    return found


def test_a_second_file_is_the_base(files, tiny_networks):
    t2i = Text2Image.from_file(files["tuned"], guidance_base=files["base"])
    assert t2i.guidance_base.model_hash == file_hash(files["base"]) != t2i.model_hash
    expected = pipeline(moved(tiny_networks), denoiser(tiny_networks))
    options = {"seeds": SEEDS, "guidance_scale": 4.0, **SMALL}
    torch.testing.assert_close(
        latents(t2i(PROMPTS, **options)), latents(expected(PROMPTS, **options)), **NEAR
    )


@pytest.mark.parametrize("weights", [[1.0], [0.6, -0.2]])
def test_a_lora_on_its_own_base_needs_no_second_model(files, weights):
    loras = [(files["lora"], weight) for weight in weights]
    t2i = Text2Image.from_file(files["base"], loras=loras, guidance_base=files["base"])
    assert t2i.guidance_base.unet is t2i.unet and t2i.guidance_base.text_encoder is t2i.text_encoder
    merged = Text2Image.from_file(files["base"], loras=loras)
    two = pipeline(
        {name: getattr(merged, name) for name in ("unet", "vae", "text_encoder")},
        Text2Image.from_file(files["base"]).denoiser,
    )
    prompts, options = PROMPTS[:2], {"seeds": SEEDS[:2], "guidance_scale": 4.0, **SMALL}
    drawn = latents(t2i(prompts, **options))
    torch.testing.assert_close(drawn, latents(two(prompts, **options)), rtol=1e-3, atol=1e-3)
    assert (drawn - latents(merged(prompts, **options))).abs().max() > 1e-2


@pytest.mark.parametrize(
    "name, reason",
    [("v", "its prediction type: v, not eps"), ("schedule", "it has another noise schedule")],
)
def test_a_base_that_does_not_fit_is_refused_before_weights_are_read(files, monkeypatch, name, reason):
    monkeypatch.setattr("ldm.model_file.load_state_dicts", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match=f"The guidance base does not fit the model, {reason}"):
        Text2Image.from_file(files["tuned"], guidance_base=files[name])


def test_a_base_of_another_family_is_refused(tiny_networks, tiny_config):
    wide = copy.deepcopy(tiny_config)
    wide["unet"]["params"]["context_dim"] = 48
    wide["text_encoder"]["params"]["hidden_size"] = 48
    base = base_denoiser(build_module(wide))
    with pytest.raises(UserError, match="its context width: 48, not 32.*Name the model that this one was"):
        pipeline(tiny_networks, base)
