"""The UNet's training graph is compiled by one key, and is the same network; nothing else is compiled."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from ldm.errors import UserError
from ldm.models.conditioning import Conditioning
from ldm.runs.sampling import text2image
from ldm.schema import TrainerOptions
from ldm.training import learning_networks
from ldm.training.compiling import TrainingGraph
from ldm.training.latent_diffusion import LatentDiffusion
from tests.factories import LEAN, build_module
from tests.short_runs import At, Job, Killed, curves_of, differences, kill, state_of

inductor = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


def test_compiling_keeps_names(tiny_config: dict):
    plain = build_module(tiny_config)
    compiled = build_module(tiny_config, compile="default")
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert dict(compiled.named_modules()).keys() == dict(plain.named_modules()).keys()
    assert len(list(compiled.parameters())) == len(list(plain.parameters()))


def test_a_run_translates_one_graph(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Four steps, two validations and a sample: one translation, and the losses of the plain network.

    Killed and resumed it is the same run to the bit.
    """
    job(tmp_path / "plain")
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(
        learning_networks, "TrainingGraph", lambda unet, mode: TrainingGraph(unet, backend=counter)
    )
    compiled = job(tmp_path / "compiled", params={"compile": "default"})
    assert counter.frame_count == 1
    text2image(compiled, size=16)(["a disc", "sks disc"], seeds=[1, 2], steps=2)
    assert counter.frame_count == 1
    for name in ("train/loss", "val/loss"):
        losses = [[loss for _, loss in curves_of(tmp_path / way)[name]] for way in ("plain", "compiled")]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(set(losses[0])) > 1
    again = killed_and_resumed(job, tmp_path / "again")
    assert counter.frame_count == 3  # each process translates it
    assert differences(compiled.state_dict(), again.state_dict()) == []
    assert differences(state_of(tmp_path / "compiled", 4), state_of(tmp_path / "again", 4)) == []
    assert curves_of(tmp_path / "again") == curves_of(tmp_path / "compiled")


def killed_and_resumed(job: Job, folder: Path) -> LatentDiffusion:
    torch._dynamo.reset()
    with pytest.raises(Killed):
        job(folder, callbacks=[At(2, kill)], params={"compile": "default"})
    torch._dynamo.reset()
    return job(folder, params={"compile": "default"})


@pytest.mark.slow
@inductor
def test_a_run_compiled_by_inductor_resumes_to_the_bit(job: Job, tmp_path: Path):
    whole = job(tmp_path / "whole", params={"compile": "default"})
    again = killed_and_resumed(job, tmp_path / "again")
    assert differences(whole.state_dict(), again.state_dict()) == []
    assert differences(state_of(tmp_path / "whole", 4), state_of(tmp_path / "again", 4)) == []


def test_a_compiler_that_fails_is_a_sentence(tiny_config: dict, tmp_path: Path):
    """Such as over a library that a killed one left cut short."""

    def inductor(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        raise ImportError(f"{tmp_path}/x.so: file too short")

    module = build_module(tiny_config)
    module.training_graph = TrainingGraph(module.networks["unet"], backend=inductor)
    with pytest.raises(UserError, match=r"x\.so: file too short \(model\.params\.compile.*remove the file"):
        outcome(module)


def test_it_does_not_go_with_steps_in_the_backward_pass(tiny_config: dict):
    module = build_module(tiny_config, compile="default", optimizer=LEAN)
    with pytest.raises(UserError, match="all gradients at its end.*model.params.optimizer=adamw"):
        module.check(TrainerOptions(max_steps=3))


def outcome(module: LatentDiffusion) -> list[Tensor]:
    torch.manual_seed(0)
    x, t, context = torch.randn(3, 4, 8, 8), torch.tensor([3, 700, 1]), torch.randn(2, 32, 32)
    output = module.apply_model(x, t, Conditioning(context[[0, 1, 0]]))
    output.square().sum().backward()
    return [output.detach(), *(p.grad for p in module.networks["unet"].parameters())]


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=[pytest.mark.slow, inductor])])
def test_the_compiled_network_is_the_plain_one(tiny_config: dict, tiny_networks: dict, backend: str):
    """Outputs and gradients are the eager ones, to rounding in float32."""
    plain = build_module(tiny_config)
    plain.networks["unet"].load_state_dict(tiny_networks["unet"].state_dict())
    compiled = copy.deepcopy(plain)
    compiled.training_graph = TrainingGraph(compiled.networks["unet"], backend=backend)
    for a, b in zip(outcome(compiled), outcome(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
