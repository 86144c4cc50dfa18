"""SDXL's LoRA against diffusers and PEFT: one training step is theirs, their files are read."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.checkpoints.load import open_model
from ldm.checkpoints.lora import read_lora, save_lora
from ldm.errors import UserError
from ldm.families.sdxl.conditioning import size_vector
from ldm.model_file import ModelFile
from ldm.models.conditioning import Conditioning
from ldm.optim.optimizers import build_optimizer
from ldm.training.latent_diffusion import LatentDiffusion
from tests.factories import build_module
from tests.families import tiny_sdxl
from tests.families.tiny_sdxl import relative_error

TOLERANCE = 1e-5  # of the largest number, float32
ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
NETWORKS = ("unet", *ENCODERS)
RATES = {"unet": 1e-3, "text_encoder": 5e-4, "text_encoder_2": 2e-4}
PRIOR_WEIGHT = 0.5
PROMPTS = ["a sks disc"] * 2 + ["a disc"] * 2
SIZES = torch.tensor([[1003, 3003, 5, 9, 16, 16], [40, 24, 0, 3, 16, 16]] + [[16, 16, 0, 0, 16, 16]] * 2)


@pytest.fixture
def module(xl_folder: Path) -> LatentDiffusion:
    """A LoRA of both encoders and the UNet, far from its start."""
    lora = {"target": "ldm.models.lora.LoRA", "params": {"rank": 2, "alpha": 3.0}}
    rates = {"clip_l": RATES["text_encoder"], "clip_g": RATES["text_encoder_2"]}
    trainable = {"lora": lora, "learning_rate": RATES["unet"], "text_encoder_learning_rate": rates}
    config = tiny_sdxl.model_section(xl_folder)
    module = build_module(config, trainable=trainable, objective={"prior_loss_weight": PRIOR_WEIGHT})
    for name, network in tiny_sdxl.networks(xl_folder).items():
        module.networks[name].load_state_dict(network.state_dict())
    torch.manual_seed(3)
    for parameter in module.lora.parameters():
        nn.init.normal_(parameter, std=0.15)
    return module


@pytest.fixture
def batch() -> dict[str, Any]:
    latent_stats = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    latent_stats[:, 4:].abs_()
    names = ["subject", "subject", "prior", "prior"]
    items = torch.tensor([4, 5, 4, 5])
    return {"latent_stats": latent_stats, "caption": PROMPTS, "stream": names, "item": items, "sizes": SIZES}


def in_diffusers(module: LatentDiffusion, folder: Path, out: Path) -> StableDiffusionXLPipeline:
    """Our LoRA in diffusers, where it is a PEFT adapter of each network."""
    out.mkdir()
    layers, files = module.lora.weights(), open_model(folder).state_dicts
    file = save_lora(out / "lora.safetensors", layers, files, style="kohya", dtype=None)
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    return pipe


def factors(pipe: StableDiffusionXLPipeline, network: str) -> dict[str, nn.Parameter]:
    named = getattr(pipe, network).named_parameters()
    return {name: parameter for name, parameter in named if "lora_" in name}


def reference_loss(pipe: StableDiffusionXLPipeline, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """As a DreamBooth script of diffusers computes it: contexts, pooled vector, sizes, noise, mean errors."""
    contexts = []
    for network, tokenizer in ENCODERS.items():
        how = {"padding": "max_length", "max_length": tiny_sdxl.LENGTH, "return_tensors": "pt"}
        encoded = getattr(pipe, network)(
            getattr(pipe, tokenizer)(PROMPTS, **how).input_ids, output_hidden_states=True
        )
        contexts.append(encoded.hidden_states[-2])
    scheduler = DDPMScheduler(**tiny_sdxl.SCHEDULE)
    added = {"text_embeds": encoded.text_embeds, "time_ids": SIZES.float()}
    x_t, context = scheduler.add_noise(x0, noise, t), torch.cat(contexts, dim=2)
    prediction = pipe.unet(x_t, t, context, added_cond_kwargs=added).sample
    subject, prior = F.mse_loss(prediction, noise, reduction="none").chunk(2)
    return subject.mean() + PRIOR_WEIGHT * prior.mean()


def test_one_training_step_equals_that_of_diffusers_and_peft(module, batch, xl_folder, tmp_path):
    pipe = in_diffusers(module, xl_folder, tmp_path / "before")
    learning = {network: factors(pipe, network) for network in NETWORKS}
    start = {network: {n: p.detach().clone() for n, p in own.items()} for network, own in learning.items()}
    groups = [{"params": list(own.values()), "lr": RATES[network]} for network, own in learning.items()]
    for parameter in (parameter for group in groups for parameter in group["params"]):
        parameter.requires_grad_(True)

    batch = module.on_before_batch_transfer(batch, 0)
    expected = reference_loss(pipe, *module.sample_latents(batch))
    loss = module.training_step(batch, 0)
    assert relative_error(loss.detach(), expected.detach()) <= TOLERANCE
    optimizers = torch.optim.AdamW(groups), build_optimizer(module.trainable.param_groups(module.networks))
    for one, optimizer in zip((expected, loss), optimizers, strict=True):
        one.backward()
        optimizer.step()
    after = in_diffusers(module, xl_folder, tmp_path / "after")
    for network in NETWORKS:
        mine, reference = factors(after, network), learning[network]
        assert mine.keys() == reference.keys() and len(mine) >= 16
        updated, expected, before = (
            torch.cat([own[name].detach().flatten() for name in reference])
            for own in (mine, reference, start[network])
        )
        apart, moved = (updated - expected).norm(), (expected - before).norm()
        assert apart <= TOLERANCE * expected.norm(), network
        assert apart <= 1e-3 * moved, network  # AdamW divides by gradients: some are hardly above its epsilon
        assert moved > 100 * TOLERANCE * expected.norm(), network


@torch.no_grad()
def predicted_by_diffusers(pipe: StableDiffusionXLPipeline) -> tuple[Tensor, ...]:
    """Context, pooled vector and prediction for one noise."""
    context, _, pooled, _ = pipe.encode_prompt(PROMPTS[:2], do_classifier_free_guidance=False, device="cpu")
    added = {"text_embeds": pooled, "time_ids": SIZES[:2].float()}
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([1, 801])
    return context, pooled, pipe.unet(x, t, context, added_cond_kwargs=added).sample


@torch.no_grad()
def predicted(folder: Path, lora: Path | None) -> tuple[Tensor, ...]:
    """The same by ours, with a LoRA file or without."""
    file = ModelFile(folder)
    file.fill(loras=[] if lora is None else [(lora, 1.0)])
    encoders = file.networks["text_encoder"]
    context, pooled = encoders(encoders.tokenize(PROMPTS[:2]))
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    told = Conditioning(context, vector=size_vector(pooled, SIZES[:2]))
    return context, pooled, file.networks["unet"].predict(x, torch.tensor([1, 801]), told)


def furthest(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> float:
    return max(relative_error(a, b) for a, b in zip(ours, theirs, strict=True))


LAYERS = {"unet": ["to_q", "to_v", "ff.net.2", "proj_in"]} | dict.fromkeys(ENCODERS, ["q_proj", "out_proj"])


def peft_config(network: str, alpha: float) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=alpha, target_modules=LAYERS[network], init_lora_weights=False)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_folder_of_peft_holds_one_network(network, xl_folder, tmp_path):
    """Its keys name no network, and those of the two text encoders are alike but for their widths."""
    pipe = StableDiffusionXLPipeline.from_pretrained(xl_folder, add_watermarker=False)
    torch.manual_seed(2)
    get_peft_model(getattr(pipe, network), peft_config(network, 5)).save_pretrained(tmp_path / "lora")
    expected = predicted_by_diffusers(pipe)
    assert furthest(predicted(xl_folder, tmp_path / "lora"), expected) <= TOLERANCE
    assert furthest(predicted(xl_folder, None), expected) > 100 * TOLERANCE


def test_each_network_has_the_alpha_that_diffusers_keeps_for_it(xl_folder, tmp_path):
    pipe = StableDiffusionXLPipeline.from_pretrained(xl_folder, add_watermarker=False)
    torch.manual_seed(2)
    for alpha, network in enumerate(NETWORKS, start=3):
        getattr(pipe, network).add_adapter(peft_config(network, alpha))
    layers = {f"{n}_lora_layers": get_peft_model_state_dict(getattr(pipe, n)) for n in NETWORKS}
    configs = {
        f"{n}_lora_adapter_metadata": getattr(pipe, n).peft_config["default"].to_dict() for n in NETWORKS
    }
    pipe.save_lora_weights(tmp_path, **layers, **configs)
    (file,) = tmp_path.glob("*.safetensors")
    expected = predicted_by_diffusers(pipe)
    assert furthest(predicted(xl_folder, file), expected) <= TOLERANCE
    save_file(load_file(file), file)  # the header is what makes the difference
    assert furthest(predicted(xl_folder, file), expected) > 100 * TOLERANCE


def test_a_layer_that_no_encoder_has_is_named(xl_folder, tmp_path):
    bad = {
        f"base_model.model.encoder.layers.9.self_attn.q_proj.lora_{k}.weight": torch.zeros(2, 2) for k in "AB"
    }
    save_file(bad, tmp_path / "lora.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 2}')
    with pytest.raises(UserError, match="encoder.layers.9.* is not a key of a LoRA of this model"):
        read_lora(tmp_path / "lora.safetensors", open_model(xl_folder).state_dicts)
