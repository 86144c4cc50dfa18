"""Masked loss: gradients by hand, the whole image where nothing is masked, and runs in other divisions."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.diffusion.process import DiscreteDiffusion
from ldm.diffusion.schedule import make_alphas_cumprod
from ldm.errors import UserError
from ldm.training.latent_diffusion import LatentDiffusion
from ldm.training.masks import Masks, mix_targets
from ldm.training.objective import Objective
from tests.factories import MIN_SNR, build_module, masks
from tests.short_runs import Job, differences

PROCESS = DiscreteDiffusion(make_alphas_cumprod())
STREAMS = ["subject", "prior", "subject"]
TEACHER = {"outside": 0.25, "outside_target": "teacher"}


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mask() -> Tensor:
    """[3, 1, 4, 4]: inside on the left, half on one column, outside on the right."""
    return torch.tensor([1.0, 1.0, 0.5, 0.0]).expand(3, 1, 4, 4).clone()


def gradient_of(objective: Objective, prediction: Tensor, target: Tensor, batch: dict) -> Tensor:
    """Of the total loss by the prediction; batch: as `select` has added to it."""
    leaf = prediction.clone().requires_grad_()
    t = torch.tensor([5, 400, 900])
    losses = objective.per_item(PROCESS, leaf, target, t, batch.get("pixel_weights"))
    objective.combine(losses, batch["stream_masks"]).total.backward()
    return leaf.grad


@pytest.mark.parametrize("outside", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighting", [None, MIN_SNR], ids=["plain", "min-SNR"])
def test_the_gradient_outside_is_that_much_of_the_plain_one(outside: float, weighting: dict | None):
    prediction, target = randn(3, 4, 4, 4, seed=0), randn(3, 4, 4, 4, seed=1)
    batch = {"stream": STREAMS, "mask": mask()}
    plain, masked = (
        Objective(prior_loss_weight=0.5, weighting=weighting, masks=how) for how in (None, Masks(outside))
    )
    before = gradient_of(plain, prediction, target, plain.select(batch))
    found = gradient_of(masked, prediction, target, masked.select(batch))
    if weighting is None:  # d/dp of 1/2 sum over two subject items of the mean over 4 x 4 x 4 numbers
        torch.testing.assert_close(before[0], (prediction - target)[0] * 2 / 64 / 2)
        torch.testing.assert_close(before[1], (prediction - target)[1] * 2 / 64 * 0.5)
    assert torch.equal(found[:, :, :, :2], before[:, :, :, :2])  # inside
    assert torch.equal(found[1], before[1])  # a prior item
    for k in (0, 2):
        torch.testing.assert_close(found[k, :, :, 2], before[k, :, :, 2] * (1 + outside) / 2)
        torch.testing.assert_close(found[k, :, :, 3], before[k, :, :, 3] * outside)
        assert outside or not found[k, :, :, 3].any()


def test_a_teacher_outside_has_the_gradient_of_both_errors():
    """m |p - noise|^2 + outside (1 - m) |p - base|^2, as a mean over all pixels."""
    prediction, noise, base = (randn(3, 4, 4, 4, seed=seed) for seed in range(3))
    objective = Objective(masks=Masks(**TEACHER))
    batch = objective.select({"stream": STREAMS, "mask": mask()})
    assert batch["reference_items"] == [0, 2] and objective.needs_reference
    rows = batch["reference_rows"]
    target = noise.index_copy(0, rows, mix_targets(noise[rows], base[rows], batch["noise_share"][rows]))
    found = gradient_of(objective, prediction, target, batch)
    m = mask()
    by_hand = (m * (prediction - noise) + 0.25 * (1 - m) * (prediction - base)) * 2 / 64 / 2
    torch.testing.assert_close(found[[0, 2]], by_hand[[0, 2]])
    torch.testing.assert_close(found[1], (prediction - noise)[1] * 2 / 64)
    assert torch.equal(target[0, :, :, :2], noise[0, :, :, :2]) and torch.equal(
        target[0, :, :, 3], base[0, :, :, 3]
    )


@pytest.fixture
def batch() -> dict:
    return {
        "latent_stats": torch.cat([randn(3, 4, 8, 8, seed=0), torch.zeros(3, 4, 8, 8)], 1),
        "caption": ["a photo of sks disc", "a photo of a disc", "sks disc"],
        "stream": STREAMS,
        "item": torch.tensor([4, 4, 5]),
    }


def module_of(config: dict, networks: dict, **objective: object) -> LatentDiffusion:
    module = build_module(config, seed=7, objective=objective)
    for name, network in module.networks.items():
        network.load_state_dict(networks[name].state_dict())
    module.setup("fit")
    return module


def gradients(module: LatentDiffusion, batch: dict) -> list[Tensor]:
    module.training_step(batch, 0).backward()
    return [p.grad for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize("how", [{"outside": 0.0}, {"outside": 0.1}, TEACHER], ids=["0", "0.1", "teacher"])
def test_a_mask_of_everything_is_no_mask_to_the_bit(tiny_config, tiny_networks, batch, how: dict):
    plain = gradients(module_of(tiny_config, tiny_networks), batch)
    everything = batch | {"mask": torch.ones(3, 1, 8, 8)}
    masked = gradients(module_of(tiny_config, tiny_networks, masks=how), everything)
    unused = gradients(module_of(tiny_config, tiny_networks), batch | {"mask": torch.zeros(3, 1, 8, 8)})
    assert len(plain) > 50 and differences(plain, masked) == [] and differences(plain, unused) == []


def test_a_teacher_outside_has_nothing_to_teach_at_the_start(tiny_config, tiny_networks, batch):
    """The base predicts under the item's own caption what it predicts itself; a moved pupil is taught."""
    module = module_of(tiny_config, tiny_networks, masks=TEACHER)
    plain = module_of(tiny_config, tiny_networks)
    batch["mask"] = torch.zeros(3, 1, 8, 8)
    with torch.no_grad():
        losses = module.loss_per_item(batch)
        assert losses[[0, 2]].max() < 1e-10
        assert losses[1] == plain.loss_per_item(batch)[1] > 0.1
        for parameter in module.model.parameters():
            parameter += 0.01
        assert module.loss_per_item(batch)[[0, 2]].min() > 1e-6


def test_masks_that_say_nothing_are_refused(tiny_config):
    with pytest.raises(UserError, match="outside of the masks has no weight"):
        build_module(tiny_config, objective={"masks": {"outside": 0.0, "outside_target": "teacher"}})
    with pytest.raises(ValueError, match="needs batches with masks"):
        Objective(masks=Masks(0.1)).select({"stream": STREAMS})


def test_cached_or_not_and_however_divided_a_run_is_the_same(job: Job, tmp_path: Path):
    masks(job.subject)
    options = {"params": {"objective": {"masks": TEACHER}, "trainable": {"text_encoder": False}}}
    job = replace(job, steps=2, data={"masks": True, "crop": "random", "crop_variants": 2})
    whole = job(tmp_path / "whole", **options)
    decoded = replace(job, data=job.data | {"cache_latents": False})(tmp_path / "decoded", **options)
    split = replace(job, batch_size=1, accumulate=2)(tmp_path / "split", **options)
    unmasked = replace(job, data={**job.data, "masks": False})(
        tmp_path / "unmasked", params=options["params"] | {"objective": {}}
    )
    base = {f"model.diffusion_model.{name}": value for name, value in job.weights["unet"].items()}

    def apart(one: LatentDiffusion, other: dict) -> float:
        own = one.state_dict()
        return float(torch.cat([(own[name] - other[name]).flatten() for name in base]).norm())

    learned = apart(whole, base)
    assert apart(decoded, whole.state_dict()) < 0.01 * learned  # the VAE's rounding, by batches of views
    assert apart(split, whole.state_dict()) < 0.01 * learned
    assert apart(unmasked, whole.state_dict()) > 0.05 * learned
