"""A step as two graphs has the losses and gradients of the plain step."""

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ldm.cuda_graph import capture
from ldm.errors import UserError
from ldm.optim.optimizer_nodes import FUSED_BACKWARD
from ldm.schema import TrainerOptions
from ldm.training import cuda_graph
from ldm.training.cuda_graph import GraphedLoss, uses_cuda_graph
from ldm.training.latent_diffusion import LatentDiffusion
from tests.factories import TAUGHT, build_module

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LORA = {"trainable": {"lora": {"target": "ldm.models.lora.LoRA", "params": {"rank": 4}}}}
CASES = {
    "full": {},
    "UNet alone": {"trainable": {"text_encoder": False}},
    "LoRA": LORA,
    "teacher": TAUGHT,
    "LoRA and teacher": LORA | TAUGHT,
    "text encoder until step 0": {"trainable": {"text_encoder_steps": 0}},
    "masks": {"objective": {"masks": {"outside": 0.1}}},
    "masks with the teacher outside": {
        "objective": {"masks": {"outside": 0.5, "outside_target": "teacher"}, "prior_target": "teacher"}
    },
    "L2-SP": {"objective": {"l2_sp_weight": 0.1}},
}


def again(work: Callable[[], None], pool: None) -> tuple[Callable[[], None], None]:
    """In the place of `capture`, where there is no GPU: the work is simply done anew.

    Before it what the last backward pass left is overwritten, as that memory is in the graphs' pool.
    """
    passes = work.__self__

    def replay() -> None:
        for gradient in passes.gradients:
            if gradient is not None:
                gradient.fill_(math.nan)
        work()

    work()
    return replay, pool


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """The work that becomes a graph, one after the other."""
    found = []

    def counted(work: Callable[[], None], pool: None) -> tuple[Callable[[], None], None]:
        found.append(work)
        return again(work, pool)

    monkeypatch.setattr(cuda_graph, "GraphedLoss", partial(GraphedLoss, recorded=counted))
    return found


def batch_of(first: int, items: int = 3) -> dict:
    generator = torch.Generator().manual_seed(first)
    prompts = ["a photo of sks disc", "a photo of a disc", "", "a photo of sks disc"]
    return {
        "latent_stats": torch.rand(items, 8, 8, 8, generator=generator),
        "caption": prompts[:items],
        "stream": ["subject", "prior", "prior", "subject"][:items],
        "item": torch.arange(first, first + items),
        "mask": torch.rand(items, 1, 8, 8, generator=generator),
    }


def of_shape(batch: dict, height: int, width: int) -> dict:
    """The batch with latents of another shape."""
    stats = torch.nn.functional.interpolate(batch["latent_stats"], (height, width))
    mask = torch.nn.functional.interpolate(batch["mask"], (height, width))
    return batch | {"latent_stats": stats, "mask": mask}


def module_of(config: dict, networks: dict, device: str, *, graphed: bool, **params) -> LatentDiffusion:
    torch.manual_seed(0)
    module = build_module(config, seed=7, cuda_graph=graphed, **params)
    for name, network in module.networks.items():
        network.load_state_dict(networks[name].state_dict())
    module.setup("fit")
    module.to(device).train().on_train_start()
    return module


def gradients(module: LatentDiffusion, batches: list[dict]) -> list[Tensor]:
    """Losses and gradients of some steps of as many micro-batches, one after another."""
    found = []
    for batch in batches:
        batch = module.on_before_batch_transfer(batch, 0)
        batch = {k: x.to(module.device) if torch.is_tensor(x) else x for k, x in batch.items()}
        loss = module.training_step(batch, 0)
        (loss / len(batches)).backward()
        found.append(loss.detach().clone())
    found += [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, GPU])])
@pytest.mark.parametrize("params", CASES.values(), ids=CASES)
def test_losses_and_gradients_are_the_plain_ones(
    tiny_config: dict, tiny_networks: dict, params: dict, device: str, monkeypatch: pytest.MonkeyPatch
):
    """Over several steps, two micro-batches each, and other shapes in between."""

    recorded = again if device == "cpu" else capture
    monkeypatch.setattr(cuda_graph, "GraphedLoss", partial(GraphedLoss, recorded=recorded))
    plain = module_of(tiny_config, tiny_networks, device, graphed=False, **params)
    graphed = module_of(tiny_config, tiny_networks, device, graphed=True, **params)
    for first, items in ((0, 3), (20, 3), (40, 4)):
        batches = [batch_of(first, items), batch_of(first + 10, items)]
        expected, found = gradients(plain, batches), gradients(graphed, batches)
        assert len(expected) == len(found) > 2
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        with torch.no_grad():  # as an optimizer does, in place
            for module in (plain, graphed):
                for p in module.parameters():
                    p.mul_(0.999) if p.requires_grad else None


def test_steps_of_several_shapes_are_captured_once_each(
    tiny_config: dict, tiny_networks: dict, captured: list
):
    """As the buckets of a run come, in any order: losses and gradients stay the plain ones."""
    plain = module_of(tiny_config, tiny_networks, "cpu", graphed=False)
    graphed = module_of(tiny_config, tiny_networks, "cpu", graphed=True)
    for step, (height, width) in enumerate([(8, 8), (6, 10), (8, 8), (10, 6), (6, 10)]):
        batches = [of_shape(batch_of(20 * step + k), height, width) for k in (0, 10)]
        for a, b in zip(gradients(graphed, batches), gradients(plain, batches), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert len(captured) == 3 * 2  # forward and backward pass


@pytest.mark.parametrize("shapes, graphed", [([(8, 8)], True), ([(6, 10), (10, 6)], False)])
@pytest.mark.parametrize("asked", [None, True, False])
def test_without_being_asked_several_buckets_have_no_graphs(
    tiny_config: dict, shapes: list, graphed: bool, asked: bool | None
):
    """Each would keep the memory of its own."""
    with torch.device("meta"):
        module = build_module(tiny_config, cuda_graph=asked)
    module.__class__ = type("OnGPU", (module.__class__,), {"device": torch.device("cuda")})
    data = SimpleNamespace(buckets_in_use=SimpleNamespace(shapes=shapes))
    found = uses_cuda_graph(module, SimpleNamespace(world_size=1, datamodule=data))
    assert found == (graphed if asked is None else asked)
    assert uses_cuda_graph(module, SimpleNamespace(world_size=1, datamodule=None)) == (asked is not False)


@pytest.mark.parametrize(
    "params, processes, told",
    [
        ({"optimizer": {"target": FUSED_BACKWARD}}, 1, "to a fused backward pass"),
        ({}, 2, "to other processes"),
        ({"compile": "reduce-overhead"}, 1, "CUDA graphs of its own, which cannot be captured in another"),
    ],
)
def test_graphs_that_would_train_nothing_are_refused(
    tiny_config: dict, monkeypatch: pytest.MonkeyPatch, params: dict, processes: int, told: str
):
    """Their gradients reach no hook, or they hold other graphs; without being asked there are none."""
    trainer = TrainerOptions(max_steps=1, gradient_clip_val=None)
    module = build_module(tiny_config, **params)
    module.check(trainer, processes=processes)
    module.__class__ = type("OnGPU", (module.__class__,), {"device": torch.device("cuda")})
    on_gpu = SimpleNamespace(world_size=processes, datamodule=None)
    assert not uses_cuda_graph(module, on_gpu)
    module.cuda_graph = True
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=rf"{told} \(model.params.cuda_graph\). Set it to false."):
        module.check(trainer, processes=processes)


@pytest.mark.parametrize("accelerator, cuda", [("cpu", True), ("auto", False), ("mps", False)])
def test_graphs_without_a_gpu_are_refused(
    tiny_config: dict, monkeypatch: pytest.MonkeyPatch, accelerator: str, cuda: bool
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    module, trainer = build_module(tiny_config), TrainerOptions(max_steps=1, accelerator=accelerator)
    module.check(trainer)
    module.cuda_graph = True
    with pytest.raises(UserError, match=r"need an NVIDIA GPU.*\(model.params.cuda_graph\). Set it to false."):
        module.check(trainer)


def test_values_of_a_step_outlive_the_next(
    tiny_config: dict, tiny_networks: dict, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cuda_graph, "GraphedLoss", partial(GraphedLoss, recorded=again))
    module = module_of(tiny_config, tiny_networks, "cpu", graphed=True)
    first = module.loss_per_item(batch_of(0))
    kept = first.detach().clone()
    second = module.loss_per_item(batch_of(10))
    assert torch.equal(first.detach(), kept) and not torch.equal(second.detach(), kept)


def test_graphs_are_captured_anew_where_weights_have_moved(
    tiny_config: dict, tiny_networks: dict, captured: list
):
    """The VAE's, which moves between devices during a run, are not in them."""
    module = module_of(tiny_config, tiny_networks, "cpu", graphed=True)
    for moved, captures in ((None, 2), ("vae", 2), ("unet", 4), ("text_encoder", 6)):
        for p in module.networks[moved].parameters() if moved else ():
            p.data = p.data.clone()
        module.loss_per_item(batch_of(0))
        assert len(captured) == captures, moved
