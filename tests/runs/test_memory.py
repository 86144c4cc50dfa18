"""The estimate against what a real step holds."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, chain
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ldm.data.latents import views_at_once
from ldm.engine.peak import PeakBytes
from ldm.optim.optimizer_nodes import steps_in_backward
from ldm.optim.optimizers import build_optimizer
from ldm.optim.sizes import BLOCK, checkpoint_bytes, state_bytes
from ldm.runs import disk as disk_space
from ldm.runs.disk import checkpoints_to_come
from ldm.runs.memory import MIB, encoding, estimate, report
from ldm.schema import RunConfig
from ldm.training.latent_diffusion import LatentDiffusion
from tests.factories import LEAN_BF16, TAUGHT, build_module
from tests.short_runs import Job, state_of

SIZE, BATCH = 16, 2
TAUGHT_OUTSIDE = {"objective": {"masks": {"outside": 1.0, "outside_target": "teacher"}}}
LORA = {"target": "ldm.models.lora.LoRA", "params": {"rank": 4, "unet": ["attention", "convolutions"]}}


def config_of(
    tiny_config: dict, *, trainer: dict | None = None, data: dict | None = None, **params
) -> RunConfig:
    own = {"subject_root": "photos", "class_word": "disc", "size": SIZE, "batch_size": BATCH, "num_priors": 3}
    model = {"target": "ldm.training.latent_diffusion.LatentDiffusion", "params": tiny_config | params}
    data = {"target": "ldm.data.dreambooth.DreamBoothDataModule", "params": own | (data or {})}
    trainer = {"max_steps": 1} | (trainer or {})
    return RunConfig.parse({"name": "one", "seed": 5, "model": model, "data": data, "trainer": trainer})


def step(module: LatentDiffusion) -> None:
    """One forward and backward pass as training runs it, and the optimizer's."""
    parts = {"unet": (module.networks["unet"], 1e-4), "text_encoder": (module.cond_stage_model, 1e-4)}
    optimizer = build_optimizer(parts, module.optimizer)
    batch = {
        "latent_stats": torch.rand(2 * BATCH, 8, SIZE // 2, SIZE // 2),
        "caption": ["a photo of sks disc"] * BATCH + ["a photo of a disc"] * BATCH,
        "stream": ["subject"] * BATCH + ["prior"] * BATCH,
        "item": torch.arange(BATCH).repeat(2),
    }
    module.training_step(batch, 0).backward()
    optimizer.step()
    module.state = optimizer.state


def gradient_bytes(module: LatentDiffusion) -> int:
    return sum(p.grad.nbytes for p in module.parameters() if p.grad is not None)


CONCEPTS = [
    {"root": "photos", "identifier": "sks", "class_word": "disc"},
    {"root": "rings", "identifier": "zwx", "class_word": "ring"},
]
ALIKE = ("sks disc", "sks disc", "a disc", "a disc")


def saved_bytes(module: LatentDiffusion, *, mixed: bool, captions: Sequence[str] = ALIKE) -> int:
    """What the graph of the networks' forward pass keeps beside their weights, on real tensors."""
    own = {p.untyped_storage().data_ptr() for p in chain(module.parameters(), module.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed), saved_tensors_hooks(keep, lambda t: t):
        told = module.condition(list(captions))
        x, t = torch.zeros(2 * BATCH, 4, SIZE // 2, SIZE // 2), torch.zeros(2 * BATCH, dtype=torch.int64)
        output = module.apply_model(x, t, told)
    assert output.requires_grad
    return sum(size for pointer, size in kept.items() if pointer not in own)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"trainable": {"text_encoder": False}},
        {"optimizer": "adamw_bf16"},
        {"optimizer": "adamw_bf16_moments"},
        {"optimizer": LEAN_BF16},
    ],
)
def test_weights_gradients_and_states_are_exact(tiny_config: dict, params: dict):
    needs, _ = estimate(config_of(tiny_config, **params))
    module = build_module(tiny_config, **params)
    held: list[int] = []  # bytes of gradients, whenever one has arrived
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _: held.append(gradient_bytes(module)))
    step(module)
    for name in ("unet", "text_encoder"):
        weights = list(module.networks[name].parameters())
        states = [v for p in weights for v in module.state.get(p, {}).values() if torch.is_tensor(v)]
        assert needs[name].weights == sum(p.nbytes for p in weights)
        assert needs[name].states == sum(v.nbytes for v in states)
        if not steps_in_backward(module.optimizer):
            assert needs[name].gradients == sum(p.grad.nbytes for p in weights if p.grad is not None)
    if steps_in_backward(module.optimizer):
        assert all(p.grad is None for p in module.parameters())
        assert max(held) <= needs["unet"].gradients < max(held) + max(p.nbytes for p in module.parameters())
        assert max(held) < sum(p.nbytes for p in module.parameters() if p.requires_grad) / 2


def test_a_lora_needs_gradients_and_states_for_its_factors_alone(tiny_config: dict):
    needs, _ = estimate(config_of(tiny_config, trainable={"lora": LORA}, compile="default"))
    module = build_module(tiny_config, trainable={"lora": LORA})
    factors = list(module.lora.parameters())
    size = sum(p.nbytes for p in factors)
    assert (needs["lora"].weights, needs["lora"].gradients) == (size, size)
    assert needs["lora"].states == 2 * size + 4 * len(factors)
    assert needs["unet"].gradients == needs["unet"].states == needs["text_encoder"].states == 0
    assert needs["unet"].weights == sum(p.nbytes for p in module.networks["unet"].parameters())


@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "bf16-mixed"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["all", "lora"])
def test_activations_are_what_the_graph_saves(tiny_config: dict, mixed: bool, lora: dict | None):
    trainer = {"precision": "bf16-mixed"} if mixed else {}
    needs, _ = estimate(config_of(tiny_config, trainer=trainer, trainable={"lora": lora}))
    counted = saved_bytes(build_module(tiny_config, trainable={"lora": lora}), mixed=mixed)
    assert sum(need.activations for need in needs.values()) == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize(
    ("data", "captions"),
    [
        ({"captions": True}, ("sks disc", "sks disc on grass", "a disc", "a disc on grass")),
        ({"concepts": CONCEPTS}, ("sks disc", "zwx ring", "a disc", "a ring")),
        ({"prior_caption_dropout": 0.5}, ("sks disc", "sks disc", "a disc", "")),
        ({"caption_dropout": 0.5}, ("sks disc", "", "a disc", "a disc")),
        ({"captions": True, "prior_caption_dropout": 0.5}, ("sks disc", "disc sks", "a disc", "")),
        ({"num_priors": 0, "prior_caption_dropout": 1.0}, ("sks disc", "sks disc", "", "")),
        ({"num_priors": 0, "diff_output_preservation": True}, ALIKE),
    ],
)
def test_every_caption_that_a_step_may_have_is_counted(tiny_config: dict, data: dict, captions: tuple):
    tiny_config["objective"] = {"prior_target": "teacher"}
    if "concepts" in data:
        data = {**data, "subject_root": None, "class_word": None}
    needs, _ = estimate(config_of(tiny_config, data=data))
    counted = saved_bytes(build_module(tiny_config), mixed=False, captions=captions)
    found = sum(needs[name].activations for name in ("unet", "text_encoder"))
    assert found == pytest.approx(counted, rel=0.02)


def test_fsdp_leaves_each_process_its_share(tiny_config: dict):
    whole, _ = estimate(config_of(tiny_config))
    split, _ = estimate(config_of(tiny_config, trainer={"strategy": "fsdp", "devices": 4}))
    for name in ("unet", "text_encoder"):
        for kind in ("weights", "gradients", "states"):
            assert getattr(split[name], kind) == -(-getattr(whole[name], kind) // 4)
        assert split[name].activations == whole[name].activations


def test_checkpointing_is_counted_stage_by_stage(tiny_config: dict):
    """Computing all again needs least; choosing a resolution lies between."""
    found = []
    for chosen in (False, [1], [2], True):
        tiny_config["unet"]["params"]["use_checkpoint"] = chosen
        found.append(estimate(config_of(tiny_config))[0]["unet"].activations)
    none, fine, coarse, everything = found
    assert everything < min(fine, coarse) <= max(fine, coarse) < none


def test_files_and_averages(tiny_config: dict):
    config = config_of(tiny_config)
    needs, disk = estimate(config)
    module = build_module(tiny_config)
    assert disk["model file"] == 2 * sum(p.numel() for p in module.parameters())
    assert "vae" not in needs
    online = config_of(tiny_config, data={"online_priors": True})  # which it draws on the device
    assert "vae" in estimate(online)[0]
    weights = sum(t.nbytes for t in module.state_dict().values())
    states = sum(need.states for need in needs.values())
    count = checkpoints_to_come(config, evaluate_every=0)
    assert disk[f"checkpoints, at most {count}"] == count * (weights + states)
    learning = 4 * sum(p.numel() for p in module.parameters() if p.requires_grad)
    averaged, files = estimate(replace(config, ema_decay=0.99))
    assert averaged["average"].total == averaged["average"].weights == learning < weights
    assert files[f"checkpoints, at most {count}"] == count * (weights + learning + states)
    assert "average" not in estimate(replace(config, ema_decay=0.99, ema_device="cpu"))[0]
    assert estimate(config_of(tiny_config, data={"cache_latents": False}))[0]["vae"].weights > 0
    assert weights + states == checkpoint_bytes(module, averaged=False)
    assert f"{sum(need.total for need in needs.values()) / MIB:,.1f}" in report(needs, disk)


def test_encoding_takes_what_the_encoder_makes(tiny_config: dict):
    """As much as on real tensors, of as many views as are encoded at once; the allocator gives 3 % more."""
    config = config_of(tiny_config, data={"size": 64})
    module = build_module(tiny_config)
    images = torch.zeros(views_at_once(64), 3, 64, 64)
    with torch.no_grad(), PeakBytes() as made:
        module.networks["vae"].encoder(images)
    weights = sum(p.nbytes for p in module.parameters())
    assert encoding(config) == weights + images.nbytes + made.peak
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.no_grad(), torch.profiler.profile(activities=[activity], profile_memory=True) as profile:
        module.networks["vae"].encoder(images)
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    assert max(accumulate(changes)) == pytest.approx(made.peak, rel=0.03)
    assert f"{encoding(config) / MIB:,.1f}" in report(*estimate(config), encoding=encoding(config))


@pytest.mark.parametrize("size, count", [(16, 8), (64, 8), (256, 4), (512, 1), (768, 1)])
def test_large_views_are_encoded_alone(size: int, count: int):
    assert views_at_once(size) == count


def test_8_bit_states_take_about_two_bytes_a_weight():
    large, small = torch.empty(64 * BLOCK, 4), torch.empty(100)
    assert state_bytes(large, "adamw_8bit") == 2 * large.numel() * (1 + 4 / BLOCK)
    assert state_bytes(small, "adamw_8bit") == 8 * 100


@pytest.mark.parametrize("where", ["samples", "evaluation", "online_eval"])
def test_the_base_that_guides_is_counted_once(tiny_config: dict, where: str):
    own = config_of(tiny_config)
    node = {"target": "ldm.evaluation.storybook.StorybookEvaluation", "params": {}}
    guided = {
        "samples": {"samples": replace(own.samples, guidance_base=True)},
        "evaluation": {"evaluation": node | {"params": {"guidance_base": True}}},
        "online_eval": {
            "evaluation": node,
            "online_eval": replace(own.online_eval, every_steps=1, params={"guidance_base": True}),
        },
    }
    needs, _ = estimate(replace(own, **guided[where]))
    both, _ = estimate(
        replace(own, **guided["samples"], evaluation=node | {"params": {"guidance_base": True}})
    )
    weights = needs["unet"].gradients + needs["text_encoder"].gradients  # float32, as large as the weights
    assert needs["copies of the base"].weights == both["copies of the base"].weights == weights


@pytest.mark.parametrize(
    "params, online, copies",
    [({}, False, 0), (TAUGHT, False, 1), (TAUGHT, True, 2), (TAUGHT_OUTSIDE, False, 1)],
)
def test_copies_of_the_base_are_counted(tiny_config: dict, params: dict, online: bool, copies: int):
    config = config_of(tiny_config, **params, data={"online_priors": online})
    needs, _ = estimate(config)
    counted = needs["copies of the base"].weights if copies else 0
    lora = {"trainable": {"lora": {"target": "ldm.models.lora.LoRA", "params": {}}}}
    beside, _ = estimate(config_of(tiny_config, **params, **lora))
    assert "copies of the base" not in beside  # its factors are switched off instead
    learns = needs["unet"].gradients + needs["text_encoder"].gradients  # float32, as large as the weights
    assert counted == copies * learns and ("copies of the base" in needs) == (copies > 0)


@pytest.mark.parametrize(
    "params, ema_decay",
    [
        ({}, 0.9),
        ({"optimizer": "adamw_bf16"}, 0.9),
        ({"optimizer": LEAN_BF16}, None),
        ({"trainable": {"text_encoder": False}}, None),
        ({"trainable": {"lora": LORA}}, 0.9),
    ],
    ids=["averaged", "bf16-averaged", "fused_backward", "unet", "lora-averaged"],
)
def test_the_disk_that_a_plan_names_and_a_run_asks_for_is_what_a_checkpoint_takes(
    job: Job, tiny_config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, params: dict, ema_decay
):
    asked: list[int] = []
    monkeypatch.setattr(disk_space, "require_space", lambda folder, needed, what: asked.append(needed))
    job.steps, rare = 1, {"ema_decay": ema_decay, "checkpoint_every": 10**6}
    job(tmp_path, params=params, **rare)
    assert asked == [estimate(replace(config_of(tiny_config, **params), **rare))[1]["checkpoints, at most 1"]]
    state = state_of(tmp_path, 1)
    states = [v for s in state["optimizer_states"][0]["state"].values() for v in s.values()]
    held = [*state["state_dict"].values(), *state.get("current_model_state", {}).values(), *states]
    tensors = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held if torch.is_tensor(t)
    }
    assert asked[0] == sum(tensors.values())
