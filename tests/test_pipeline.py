"""Text2Image: a picture depends on its seed and prompt alone; live modules come back as they were."""

import json
import logging

import pytest
import torch
from PIL import Image
from torch import nn

from ldm.checkpoints.load import file_hash
from ldm.checkpoints.save import save_model
from ldm.diffusion.process import DiscreteDiffusion
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import make_alphas_cumprod
from ldm.errors import UserError
from ldm.models.unet import Prepared
from ldm.pipeline import Sample, Text2Image
from ldm.randomness import randn
from ldm.runs.sampling import SamplesConfig, generate_samples

PROMPTS = ["a dog", "a red cat", "a dog", "a car", "a dog"]
SEEDS = [0, 1, 2, 3, 0]
SMALL = {"steps": 3, "height": 16, "width": 24}


@pytest.fixture
def pipeline(tiny_networks: dict[str, nn.Module]) -> Text2Image:
    return Text2Image(**tiny_networks, process=DiscreteDiffusion(make_alphas_cumprod()), default_size=16)


def latents(samples: list[Sample]) -> torch.Tensor:
    return torch.stack([sample.latents for sample in samples])


def count_calls(monkeypatch: pytest.MonkeyPatch, module: nn.Module, method: str = "forward") -> list[int]:
    """Batch sizes of the calls to come."""
    sizes, original = [], getattr(module, method)

    def counted(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return original(x, *rest)

    monkeypatch.setattr(module, method, counted)
    return sizes


@pytest.mark.parametrize(
    "how",
    [{"sampler": "ddim", "eta": 1.0}, {"spacing": "karras"}, *({"sampler": name} for name in SAMPLERS)],
    ids=str,
)
def test_a_picture_is_the_same_in_any_batch(pipeline, how):
    options = {"seeds": SEEDS, "negative_prompt": "blur", **how, **SMALL}
    together = pipeline(PROMPTS, batch_size=4, **options)
    alone = pipeline(PROMPTS, batch_size=1, **options)
    torch.testing.assert_close(latents(together), latents(alone), rtol=1e-4, atol=1e-4)
    for a, b in zip(together, alone, strict=True):
        assert a.image.size == (24, 16) and a.image.mode == "RGB"
        difference = torch.tensor(list(a.image.tobytes())) - torch.tensor(list(b.image.tobytes()))
        assert difference.abs().max() <= 1
    assert [(s.prompt, s.seed) for s in together] == list(zip(PROMPTS, SEEDS, strict=True))
    torch.testing.assert_close(together[0].latents, together[4].latents, rtol=1e-4, atol=1e-4)
    assert (together[0].latents - together[2].latents).abs().max() > 0.1  # another seed


def recorded_timesteps(monkeypatch: pytest.MonkeyPatch, pipeline: Text2Image) -> list[float]:
    """Those at which the UNet will predict."""
    seen, predict = [], pipeline.unet.predict

    def recorded(x: torch.Tensor, t: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(t[0].item())
        return predict(x, t, *rest)

    monkeypatch.setattr(pipeline.unet, "predict", recorded)
    return seen


@pytest.mark.parametrize(
    "sampler, first", [(name, 501 if name in ("ddim", "plms") else 999) for name in SAMPLERS]
)
def test_each_sampler_begins_at_its_own_timestep(pipeline, monkeypatch, sampler: str, first: int):
    seen = recorded_timesteps(monkeypatch, pipeline)
    pipeline(["a"], seeds=[1], sampler=sampler, **SMALL | {"steps": 2})
    assert seen[0] == first == max(seen)


def test_a_spacing_says_where_the_steps_are(pipeline, monkeypatch):
    """Also between timesteps, whose embeddings are computed once for all steps."""
    seen = recorded_timesteps(monkeypatch, pipeline)
    embedded = count_calls(monkeypatch, pipeline.unet.time_embed[2])
    pipeline(["a"], seeds=[1], sampler="dpm++2m", spacing="karras", **SMALL | {"steps": 5})
    assert embedded == [5] and seen == pytest.approx(
        [level.t for level in pipeline.process.levels(5, "karras")][:-1]
    )
    assert any(t % 1 for t in seen)
    seen.clear()
    pipeline(["a"], seeds=[1], sampler="ddim", spacing="trailing", **SMALL | {"steps": 4})
    assert seen == [999, 749, 499, 249]


def test_samples_of_a_run_have_its_spacing(pipeline, monkeypatch):
    seen = recorded_timesteps(monkeypatch, pipeline)
    generate_samples(pipeline, SamplesConfig(steps=2, n=1, spacing="trailing"), ["a dog"])
    assert seen == [999, 499]


def test_zero_terminal_snr_begins_in_noise_alone(tiny_networks, monkeypatch):
    process = DiscreteDiffusion(make_alphas_cumprod(zero_terminal_snr=True), parameterization="v")
    pipeline = Text2Image(**tiny_networks, process=process, default_size=16)
    seen = recorded_timesteps(monkeypatch, pipeline)
    for name in SAMPLERS:
        assert pipeline(["a"], seeds=[1], sampler=name, steps=3)[0].latents.isfinite().all()
    assert max(seen) == 999 and seen.count(999) == len(SAMPLERS)
    with pytest.raises(UserError, match="must begin at the last timestep"):
        pipeline(["a"], seeds=[1], spacing="leading")


def test_noise_comes_from_the_pictures_own_seed(pipeline, monkeypatch):
    """A network that sees no noise leaves x_T scaled, and the step noise added to it."""

    def nothing(x: torch.Tensor, t: torch.Tensor, prepared: Prepared) -> torch.Tensor:
        return torch.zeros(prepared.conditioning.items, *x.shape[1:])

    monkeypatch.setattr(pipeline.unet, "forward", nothing)
    alphas = pipeline.process.alphas_cumprod

    def drawn(purpose: str) -> torch.Tensor:
        return randn((4, 8, 8), seed=7, items=[0], purpose=f"sample/{purpose}")[0]

    plain = pipeline(["a dog"], seeds=[7], steps=1)[0].latents
    torch.testing.assert_close(plain, drawn("x_T") * (alphas[0] / alphas[1]).sqrt())
    noisy = pipeline(["a dog"], seeds=[7], steps=1, eta=1.0)[0].latents
    sigma = ((1 - alphas[0]) / (1 - alphas[1]) * (1 - alphas[1] / alphas[0])).sqrt()
    torch.testing.assert_close(noisy, plain + sigma * drawn("step/0"), rtol=1e-4, atol=1e-5)


def test_texts_are_encoded_once_and_pictures_decoded_one_by_one(pipeline, monkeypatch):
    encoded = count_calls(monkeypatch, pipeline.text_encoder)
    decoded = count_calls(monkeypatch, pipeline.vae, "decode")
    predicted = count_calls(monkeypatch, pipeline.unet)
    pipeline(PROMPTS, seeds=SEEDS, batch_size=3, steps=2)
    assert sum(encoded) == 4 and max(encoded) <= 3  # "", dog, cat, car
    assert decoded == [1] * 5 and predicted == [3, 3, 2, 2]  # with two prompts each


def test_two_passes_and_scale_1(pipeline, monkeypatch):
    both = latents(pipeline(PROMPTS[:2], seeds=[0, 1], guidance_scale=3.0, **SMALL))
    predicted = count_calls(monkeypatch, pipeline.unet)
    apart = pipeline(PROMPTS[:2], seeds=[0, 1], guidance_scale=3.0, batched_guidance=False, **SMALL)
    torch.testing.assert_close(both, latents(apart), rtol=1e-4, atol=1e-4)
    assert predicted == [2] * 6
    predicted.clear()
    unguided = pipeline(PROMPTS[:2], seeds=[0, 1], guidance_scale=1.0, **SMALL)
    assert predicted == [2] * 3 and (latents(unguided) - both).abs().max() > 1e-3


def test_a_negative_prompt_moves_the_picture(pipeline):
    plain = latents(pipeline(["a dog"], seeds=[0], **SMALL))
    negative = latents(pipeline(["a dog"], seeds=[0], negative_prompt="dark blur", **SMALL))
    assert (plain - negative).abs().max() > 1e-3
    opposed = latents(pipeline(["a dog"], seeds=[0], negative_prompt="a dog", **SMALL))
    unguided = latents(pipeline(["a dog"], seeds=[0], guidance_scale=1.0, **SMALL))
    torch.testing.assert_close(opposed, unguided, rtol=1e-4, atol=1e-4)


def test_v_prediction_is_read_as_such(tiny_networks):
    ends = [
        Text2Image(**tiny_networks, process=DiscreteDiffusion(make_alphas_cumprod(), parameterization=p))(
            ["a dog"], seeds=[0], **SMALL
        )[0].latents
        for p in ("eps", "v", "x0")
    ]
    assert all((a - b).abs().max() > 0.1 for a, b in [ends[:2], ends[1:], ends[::2]])


def test_live_modules_come_back_in_their_mode_and_may_be_trained_on(pipeline):
    """Frozen parts in eval, the rest in train mode, gradients on, within the autocast of a training run."""
    quiet = pipeline(["a dog"], seeds=[0], **SMALL)[0].latents
    pipeline.unet.train()
    pipeline.unet.middle_block.eval()
    modes = {name: module.training for name, module in pipeline.unet.named_modules()}
    parameter = next(pipeline.unet.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        drawn = pipeline(["a dog"], seeds=[0], **SMALL)[0].latents
    assert modes == {name: module.training for name, module in pipeline.unet.named_modules()}
    assert any(modes.values()) and not all(modes.values())
    assert torch.equal(drawn, quiet)  # autocast would show
    with torch.inference_mode():
        inside = pipeline(["a dog"], seeds=[0], **SMALL)[0].latents
    for kept in (drawn, inside):
        assert not kept.is_inference()
        (parameter.mean() * kept.sum()).backward()
    assert parameter.grad is not None


def test_modes_come_back_after_an_error(pipeline, monkeypatch):
    pipeline.unet.train()
    monkeypatch.setattr(pipeline.vae, "decode", lambda z: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipeline(["a dog"], seeds=[0], steps=1)
    assert pipeline.unet.training and not torch.is_inference_mode_enabled()


def test_progress_counts_steps_of_pictures(pipeline, capsys):
    heard = []
    pipeline(PROMPTS, seeds=SEEDS, steps=2, batch_size=3, progress=heard.append)
    assert heard == [3, 3, 2, 2] and capsys.readouterr().err == ""
    pipeline(PROMPTS, seeds=SEEDS, steps=2, progress=True)
    said = capsys.readouterr().err
    assert "images: " in said and "5/5" in said


def test_a_cut_prompt_is_said_once(pipeline, caplog):
    long = "abcdefghij " * 3 + "the end of it"
    with caplog.at_level(logging.WARNING):
        pipeline([long, "a dog", long], seeds=[0, 1, 2], steps=1)
        pipeline([long], seeds=[0], steps=1)
    assert len(caplog.messages) == 1 and "the end of it" in caplog.messages[0].replace("'", "")


def test_sizes_follow_the_networks(pipeline):
    assert pipeline.latent_shape() == (4, 8, 8)
    assert pipeline(["a dog"], seeds=[0], steps=1)[0].image.size == (16, 16)
    with pytest.raises(UserError, match="height 18 .* 4 pixels.*Use 16 or 20"):
        pipeline(["a dog"], seeds=[0], height=18)
    with pytest.raises(UserError, match="width 1 .*Use 4"):
        pipeline(["a dog"], seeds=[0], width=1)


def test_impossible_requests_are_refused_before_any_work(pipeline, monkeypatch):
    predicted = count_calls(monkeypatch, pipeline.unet)
    for options, error, match in [
        ({"seeds": [0, 1]}, ValueError, "1 prompts.*2 seeds"),
        ({"seeds": [0], "sampler": "dpm"}, UserError, r"ddim, plms, dpm\+\+2m, .* or unipc"),
        ({"seeds": [0], "spacing": "even"}, UserError, "leading, trailing, linspace, karras"),
        ({"seeds": [0], "steps": 0}, UserError, "1 to 1000"),
        ({"seeds": [0], "batch_size": 0}, UserError, "batch_size"),
        ({"seeds": [0], "eta": 1.1}, UserError, "eta 1.1"),
        ({"seeds": [0], "eta": -0.1}, UserError, "eta -0.1"),
        *(
            ({"seeds": [0], "sampler": name, "eta": 0.5}, UserError, "eta")
            for name in SAMPLERS
            if name != "ddim"
        ),
    ]:
        with pytest.raises(error, match=match):
            pipeline(["a dog"], **options)
    assert predicted == [] and pipeline([], seeds=[]) == []


def test_from_file_draws_what_the_networks_draw(pipeline, tiny_model_file, tiny_config):
    loaded = Text2Image.from_file(tiny_model_file)
    assert loaded.default_size == 512 and loaded.model_hash == file_hash(tiny_model_file)
    assert not any(p.requires_grad for p in loaded.unet.parameters())
    ours = latents(loaded(PROMPTS, seeds=SEEDS, **SMALL))
    torch.testing.assert_close(ours, latents(pipeline(PROMPTS, seeds=SEEDS, **SMALL)), rtol=1e-5, atol=1e-5)
    v = Text2Image.from_file(tiny_model_file, config=tiny_config | {"process": {"parameterization": "v"}})
    assert v.process.parameterization == "v"
    half = Text2Image.from_file(tiny_model_file, dtype=torch.bfloat16)
    drawn = half(["a dog"], seeds=[0], **SMALL)[0].latents
    assert drawn.dtype == torch.float32 and 0 < (drawn - ours[0]).abs().max() < 0.5


def test_from_file_reads_the_size_and_needs_a_config(tmp_path, tiny_networks, tiny_config):
    parts = {part: network.state_dict() for part, network in tiny_networks.items()}
    metadata = {"ldm.config": json.dumps(tiny_config), "ldm.size": "32"}
    path = save_model(tmp_path / "m.safetensors", parts, alphas_cumprod=None, metadata=metadata)
    assert Text2Image.from_file(path).default_size == 32
    path = save_model(tmp_path / "bare.safetensors", parts, alphas_cumprod=None)
    with pytest.raises(UserError, match="does not say which networks.*bare.*config"):
        Text2Image.from_file(path)
    assert isinstance(Text2Image.from_file(path, config=tiny_config), Text2Image)


def test_values_that_are_not_finite_are_said(pipeline, monkeypatch, caplog):
    monkeypatch.setattr(pipeline.vae, "decode", lambda z: torch.full((1, 3, 16, 16), float("nan")))
    image = pipeline(["a dog"], seeds=[0], steps=1)[0].image
    assert isinstance(image, Image.Image) and "not finite" in caplog.text
