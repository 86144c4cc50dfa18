"""Optimizers: what they promise is checked step for step against plain AdamW."""

import copy
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ldm.annotations import Node
from ldm.config import check
from ldm.errors import UserError
from ldm.optim import adamw_bf16, fused_backward
from ldm.optim.adamw_bf16 import AdamWBF16, AdamWBF16Moments, Rounding, buckets, stochastically_rounded_
from ldm.optim.fused_adamw import FusedAdamW
from ldm.optim.lion import Lion
from ldm.optim.optimizer_nodes import SHORT, OptimizerName, OptimizerNode, averages_weights
from ldm.optim.optimizers import build_optimizer, check_optimizer
from ldm.optim.sizes import state_bytes
from ldm.schema import TrainerOptions
from tests.factories import LEAN, LEAN_BF16, lean
from tests.short_runs import Job, differences, state_of


def network(layout: torch.memory_format = torch.channels_last) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 2, 3, padding=1)
    return nn.Sequential(*layers).to(memory_format=layout)


def without_decay(name: OptimizerName) -> Node:
    return {"target": SHORT[name], "params": {"weight_decay": 0.0}}


def train(net: nn.Module, optimizer: torch.optim.Optimizer, *, steps: range) -> list[Tensor]:
    """Some steps on items that depend on their number alone -> the weights afterwards."""
    for k in steps:
        x = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(k))
        optimizer.zero_grad()
        net(x.to(net[0].weight.dtype)).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize("fused", [True, False])
def test_states_of_another_layout_resume_as_if_never_stopped(fused: bool):
    """A checkpoint of plain strides goes on under channels-last weights."""

    def optimizer(net: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer({"net": (net, 1e-2)}, fused=fused)

    whole = network()
    expected = train(whole, optimizer(whole), steps=range(4))
    before = network(torch.contiguous_format)
    first = optimizer(before)
    train(before, first, steps=range(2))
    after = network()
    after.load_state_dict(before.state_dict())
    second = optimizer(after)
    second.load_state_dict(first.state_dict())
    resumed = train(after, second, steps=range(2, 4))
    for a, b in zip(resumed, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("adamw", torch.float32), ("adamw_bf16", torch.bfloat16), ("adamw_bf16_moments", torch.float32)],
)
@pytest.mark.parametrize("passes", [1, 2, 32])
def test_steps_in_the_backward_pass_are_those_after_it(
    name: str, dtype: torch.dtype, passes: int, monkeypatch: pytest.MonkeyPatch
):
    """Bit for bit, the learning rate changing; no gradient stays; states go from one way to the other."""
    monkeypatch.setattr(fused_backward, "PASSES", passes)

    def run(in_backward: list[bool]) -> tuple[dict, dict]:
        weights, state = network().to(dtype).state_dict(), None
        for half, chosen in enumerate(in_backward):
            net = network().to(dtype)  # one that no earlier optimizer steps
            net.load_state_dict(weights)
            optimizer = build_optimizer({"net": (net, 1e-2)}, lean(name) if chosen else name)
            if state is not None:
                optimizer.load_state_dict(state)
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + half)
            train(net, optimizer, steps=range(2 * half, 2 * half + 2))
            assert all((p.grad is None) == chosen for p in net.parameters())
            weights, state = net.state_dict(), optimizer.state_dict()
        return weights, state

    plain, state = run([False, False])
    for ways in ([True, True], [True, False], [False, True]):
        weights, other = run(ways)
        assert all(torch.equal(weights[name], plain[name]) for name in plain), ways
        assert other["state"].keys() == state["state"].keys()
        assert all(torch.equal(other["state"][k]["exp_avg"], v["exp_avg"]) for k, v in state["state"].items())


def test_steps_in_the_backward_pass_run_lightnings_closure():
    net = network()
    optimizer = build_optimizer({"net": (net, 1e-2)}, LEAN)
    before = [p.detach().clone() for p in net.parameters()]

    def closure() -> Tensor:
        loss = net(torch.ones(1, 3, 4, 4)).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize("value", [1.0 + 2**-10, -3.0 * (1 + 2**-9), 1e-30, 2**-7])
def test_rounding_is_right_on_average_and_goes_to_a_neighbour(value: float):
    """The mean of n draws is within 5 standard errors; values that bfloat16 has are kept."""
    n = 100_000
    draws = torch.randint(1 << 16, (n,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    rounded = stochastically_rounded_(torch.full((n,), value), draws)
    assert rounded.dtype == torch.bfloat16
    found = rounded.double().unique()
    exact = torch.tensor(value, dtype=torch.float32).double()
    assert len(found) <= 2 and found.min() <= exact <= found.max()
    gap = found.max() - found.min()
    assert (rounded.double().mean() - exact).abs() <= 5 * 0.5 * gap / n**0.5
    assert (gap == 0) == (value == 2**-7)


def test_bf16_weights_follow_float32_where_rounding_to_the_nearest_stands_still():
    """Updates of 1/64 of bfloat16's spacing: the mean weight moves as float32's, within 5 standard errors."""
    n, steps, lr = 20_000, 20, 2**-13
    exact, rounded = (nn.Linear(n, 1, bias=False, dtype=d) for d in (torch.float32, torch.bfloat16))
    kinds = {"adamw": exact, "adamw_bf16": rounded}
    for name, layer in kinds.items():
        nn.init.constant_(layer.weight, 1.5)
        optimizer = build_optimizer({"net": (layer, lr)}, without_decay(name))
        for _ in range(steps):
            layer.weight.grad = torch.ones_like(layer.weight)
            optimizer.step()
    moved = 1.5 - exact.weight.mean().item()
    assert moved == pytest.approx(steps * lr, rel=1e-3)
    spread = 2**-7 * 0.5 / n**0.5
    assert 1.5 - rounded.weight.double().mean().item() == pytest.approx(moved, abs=5 * spread)
    assert torch.tensor(1.5 - lr).bfloat16() == 1.5
    again = nn.Linear(n, 1, bias=False, dtype=torch.bfloat16)
    nn.init.constant_(again.weight, 1.5)
    half = build_optimizer({"net": (again, lr)}, without_decay("adamw_bf16"))
    for step in range(steps):
        if step == steps // 2:  # resuming repeats the rounding
            state, half = (
                half.state_dict(),
                build_optimizer({"net": (again, lr)}, without_decay("adamw_bf16")),
            )
            half.load_state_dict(state)
        again.weight.grad = torch.ones_like(again.weight)
        half.step()
    assert torch.equal(again.weight, rounded.weight)


def test_bf16_moments_grow_as_adamws_where_rounding_to_the_nearest_stands_still():
    """From an equilibrium at 1 under gradients of root 2, the second moment gains a thousandth a step, an
    eighth of bfloat16's spacing: its mean is float32's within 5 standard errors."""
    n, steps, lr = 20_000, 20, 1e-3
    exact, rounded = (nn.Linear(n, 1, bias=False) for _ in range(2))
    for name, layer in {"adamw": exact, "adamw_bf16_moments": rounded}.items():
        nn.init.zeros_(layer.weight)
        optimizer = build_optimizer({"net": (layer, lr)}, without_decay(name))
        for step in range(1 + steps):
            layer.weight.grad = torch.full_like(layer.weight, 2**0.5 if step else 1.0)
            optimizer.step()
            state = optimizer.state[layer.weight]
            if not step:  # as after many steps of ones
                state["exp_avg"].fill_(1)
                state["exp_avg_sq"].fill_(1)
                state["step"] = torch.full_like(state["step"], 1e5) if name == "adamw" else 10**5
                nn.init.zeros_(layer.weight)
        layer.square = state["exp_avg_sq"]
    assert rounded.square.dtype == torch.bfloat16 and rounded.weight.dtype == torch.float32
    wanted = 2 - 0.999**steps
    assert exact.square.mean().item() == pytest.approx(wanted, rel=1e-4)
    spread = 2**-7 * 0.5 / n**0.5
    assert rounded.square.double().mean().item() == pytest.approx(wanted, abs=5 * steps**0.5 * spread)
    assert torch.tensor(1.001).bfloat16() == 1
    torch.testing.assert_close(rounded.weight.mean(), exact.weight.mean(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("in_backward", [False, True])
def test_bf16_moments_resume_to_the_bit(in_backward: bool):
    """And are never in the weights' dtype, as torch would load them."""
    whole, part = network(), network()
    expected = train(whole, build_optimizer({"net": (whole, 1e-2)}, "adamw_bf16_moments"), steps=range(4))
    first = build_optimizer({"net": (part, 1e-2)}, "adamw_bf16_moments")
    train(part, first, steps=range(2))
    again = lean("adamw_bf16_moments") if in_backward else "adamw_bf16_moments"
    second = build_optimizer({"net": (part, 1e-2)}, again)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    kept = [state[name] for state in second.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert len(kept) == 8 and {moment.dtype for moment in kept} == {torch.bfloat16}
    for a, b in zip(train(part, second, steps=range(2, 4)), expected, strict=True):
        assert torch.equal(a, b)


def bf16_networks() -> list[nn.Module]:
    """The same two networks of small tensors, one beside the other."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 32, 3), nn.Linear(7, 5)).bfloat16()
    again = copy.deepcopy(net)
    for other in (net, again):
        for k, p in enumerate(other.parameters()):
            draws = torch.Generator().manual_seed(k)
            p.grad = torch.randn(p.shape, generator=draws).to(p)
    return [net, again]


@pytest.mark.parametrize("piece", [1, 7, 100, 10**6])
def test_a_bucket_decides_nothing(piece: int, monkeypatch: pytest.MonkeyPatch):
    """One tensor at a time or all together: the same bits. Pieces of one tensor are no others than it."""
    one, other = bf16_networks()
    together = build_optimizer({"net": (one, 1e-2)}, "adamw_bf16")
    for _ in range(3):
        together.step()
    single = build_optimizer({"net": (other, 1e-2)}, "adamw_bf16")
    monkeypatch.setattr(adamw_bf16, "buckets", lambda pieces, room: ([each] for each in pieces))
    for _ in range(3):
        single.step()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    monkeypatch.undo()
    monkeypatch.setattr(adamw_bf16, "PIECE", piece)
    pieces = [p for each in AdamWBF16([{"params": list(one.parameters())}])._pieces.values() for p in each]
    found = list(buckets(pieces, room=piece))
    assert [p.number for bucket in found for p in bucket] == list(range(len(pieces)))
    assert all(sum(p.stop - p.start for p in bucket) <= piece for bucket in found)
    for parameter in one.parameters():
        own = [p.of(parameter) for p in pieces if p.parameter is parameter]
        assert torch.equal(torch.cat(own), parameter.reshape(-1))


@pytest.mark.parametrize("room", [7, 100])
def test_a_divided_tensor_is_rounded_as_a_whole_one(room: int, monkeypatch: pytest.MonkeyPatch):
    one, other = bf16_networks()
    for net in (one, other):
        optimizer = build_optimizer({"net": (net, 1e-2)}, "adamw_bf16")
        for _ in range(3):
            optimizer.step()
        monkeypatch.setitem(adamw_bf16.ROOM, "cpu", room)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_bf16_is_adamw_with_its_result_rounded():
    """In float32 it is AdamW to rounding, gradients divided by `grad_scale`, in any layout of memory."""
    one, other = (network().float() for _ in range(2))
    ours = AdamWBF16([{"params": list(one.parameters()), "lr": 1e-2}])
    theirs = build_optimizer({"net": (other, 1e-2)}, fused=False)
    for step in range(3):
        for net in (one, other):
            net.zero_grad()
            net(torch.full((1, 3, 4, 4), float(step))).square().mean().backward()
        ours.grad_scale = torch.tensor(4.0)
        for p in one.parameters():
            p.grad = (4 * p.grad).contiguous()  # strides that are not the weight's
        ours.step()
        theirs.step()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_weights_of_any_dtype_learn_with_bf16_moments(dtype: torch.dtype):
    weight = nn.Parameter(torch.ones(3, 40, dtype=dtype))
    weight.grad = torch.full_like(weight, 5.0)
    AdamWBF16Moments([{"params": [weight], "lr": 0.125}], weight_decay=0.0).step()
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, 0.875), rtol=4e-3, atol=0)


def test_rounding_is_decided_by_seed_step_purpose_and_place():
    """Whatever was asked for before: resumed runs and passes in the backward ask in other orders."""
    net = nn.Linear(40, 50)
    bucket = AdamWBF16([{"params": list(net.parameters()), "lr": 1.0}])._pieces[net.weight]
    cpu = torch.device("cpu")
    first = Rounding(5, pieces=2, longest=2000)
    found = {
        (purpose, t): first.draws(purpose, t, bucket, cpu) for t in (1, 2) for purpose in ("mean", "weight")
    }
    again = Rounding(5, pieces=2, longest=2000)
    for (purpose, t), draws in reversed(found.items()):
        assert torch.equal(again.draws(purpose, t, bucket, cpu), draws)
        assert 0 <= draws.min() and draws.max() < 1 << 16
    assert not torch.equal(
        Rounding(6, pieces=2, longest=2000).draws("mean", 1, bucket, cpu), found["mean", 1]
    )
    values = torch.stack(list(found.values())).double() / (1 << 16)
    assert (values.mean(1) - 0.5).abs().max() < 5 / (12 * 2000) ** 0.5  # five standard errors
    assert values.corrcoef().fill_diagonal_(0).abs().max() < 5 / 2000**0.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_rounds_as_a_cpu_does():
    draws = Rounding(5, pieces=1, longest=1000)
    bucket = AdamWBF16([{"params": [nn.Parameter(torch.zeros(1000))], "lr": 1.0}])._pieces
    (bucket,) = bucket.values()
    here, there = (draws.draws("mean", 3, bucket, torch.device(name)) for name in ("cpu", "cuda"))
    assert torch.equal(here, there.cpu())
    exact = torch.randn(1000)
    on_gpu = stochastically_rounded_(exact.cuda(), there)
    assert torch.equal(stochastically_rounded_(exact.clone(), here), on_gpu.cpu())


@pytest.mark.parametrize("scale", [None, 3.0])
def test_the_fused_optimizer_is_torchs_to_the_bit_without_its_copies(scale: float | None):
    """In channels-last; torch's clones each gradient of a convolution, to no end."""
    nets, copies = [network(), network()], []
    groups = [[{"params": list(net.parameters()), "lr": 1e-2}] for net in nets]
    optimizers = [FusedAdamW(groups[0]), torch.optim.AdamW(groups[1], fused=True)]
    for net, optimizer in zip(nets, optimizers, strict=True):
        optimizer.grad_scale = None if scale is None else torch.tensor(scale)
        train(net, optimizer, steps=range(3))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.step()
        copies.append(sum(event.count for event in profile.key_averages() if event.key == "aten::clone"))
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
    assert copies == [0, 2]


def test_the_fused_optimizer_takes_gradients_of_any_strides():
    """torch's would pair each weight with the gradient of another one."""
    nets = [network(), network()]
    optimizers = [
        build_optimizer({"net": (net, 1e-2)}, fused=fused)
        for net, fused in zip(nets, (True, False), strict=True)
    ]
    for step in range(3):
        for net, optimizer in zip(nets, optimizers, strict=True):
            for k, p in enumerate(net.parameters()):
                draws = torch.Generator().manual_seed(100 * step + k)
                p.grad = torch.randn(p.shape, generator=draws)
            optimizer.step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_bf16_states_take_6_bytes_a_weight():
    net = network().bfloat16()
    optimizer = build_optimizer({"net": (net, 1e-3)}, LEAN_BF16)
    net(torch.ones(1, 3, 4, 4, dtype=torch.bfloat16)).square().mean().backward()
    tensors = [
        value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
    ]
    count = sum(p.numel() for p in net.parameters())
    assert sum(t.nbytes for t in [*tensors, *net.parameters()]) == 6 * count


@pytest.mark.parametrize(
    ("options", "more", "key"),
    [
        ({"accumulate_grad_batches": 2}, {}, "accumulate_grad_batches"),
        ({"gradient_clip_val": 1.0}, {}, "gradient_clip_val"),
        ({"precision": "16-mixed"}, {}, "precision"),
        ({}, {"processes": 2}, "devices"),
        ({}, {"compiled": True}, "model.params.compile"),
    ],
)
def test_what_needs_all_gradients_at_once_is_refused(options: dict, more: dict, key: str):
    good = TrainerOptions(max_steps=3, precision="bf16-mixed")
    check_optimizer(LEAN, good)
    check_optimizer("adamw", replace(good, **options), **more)
    with pytest.raises(UserError, match=key):
        check_optimizer(LEAN, replace(good, **options), **more)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_8_bit_without_bitsandbytes_says_how_to_get_it():
    with pytest.raises(UserError, match=r"bitsandbytes.*\[8bit\]"):
        check_optimizer("adamw_8bit", TrainerOptions(max_steps=3))


NODES = {
    "Adafactor": {"target": "torch.optim.Adafactor", "params": {"weight_decay": 0.01}},
    "RAdam": {"target": "torch.optim.RAdam", "params": {"betas": [0.9, 0.99]}},
    "SGD": {"target": "torch.optim.SGD", "params": {"momentum": 0.9, "nesterov": True}},
    "Lion": {"target": SHORT["lion"], "params": {"betas": [0.95, 0.98], "weight_decay": 0.1}},
    "Prodigy": {"target": SHORT["prodigy"], "params": {"d_coef": 2.0, "safeguard_warmup": True}},
    "AdamWScheduleFree": {"target": SHORT["schedule_free"], "params": {"betas": [0.95, 0.99], "r": 1.0}},
}


@pytest.mark.parametrize("name", NODES)
def test_any_optimizer_learns_and_resumes_to_the_bit(job: Job, tmp_path: Path, name: str):
    """By the config alone, which its parameter groups follow."""
    warm = {"target": "ldm.optim.schedules.Constant", "params": {"warmup_steps": 3}}
    params = {"optimizer": NODES[name], "lr_schedule": warm}
    params["trainable"] = {"learning_rate": 1.0 if name == "Prodigy" else 1e-3}
    module = job(tmp_path / "whole", params=params)
    for steps in (2, 4):
        replace(job, steps=steps)(tmp_path / "halves", params=params)
    states = [state_of(tmp_path / folder, 4) for folder in ("whole", "halves")]
    assert differences(*[state["state_dict"] for state in states]) == []
    kept = states[0]["optimizer_states"][0]
    assert differences(kept, states[1]["optimizer_states"][0]) == []
    after = module.networks["unet"].state_dict()
    assert max(float((weight - after[key]).abs().max()) for key, weight in job.weights["unet"].items()) > 1e-6
    for group in kept["param_groups"]:
        for key, value in NODES[name]["params"].items():
            assert (list(group[key]) if isinstance(value, list) else group[key]) == value


@pytest.mark.parametrize("name", NODES)
def test_the_states_of_any_optimizer_are_counted(name: str):
    net = network()
    optimizer = build_optimizer({"net": (net, 1e-2)}, NODES[name])
    if averages_weights(NODES[name]):
        optimizer.train()
    train(net, optimizer, steps=range(1))
    for parameter in net.parameters():
        held = sum(x.nbytes for x in optimizer.state[parameter].values() if torch.is_tensor(x))
        assert state_bytes(parameter, NODES[name]) == held > 0


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"target": "torch.optim.SGD", "params": {"lr": 0.1}}, r"model's \(model.params.optimizer.params.lr"),
        ({"target": "torch.optim.SGD", "params": {"momentum": -1}}, "Invalid momentum"),
        ({"target": "torch.optim.SGD", "params": {"nesterov": True}}, "Nesterov momentum requires"),
        ({"target": "torch.optim.LBFGS"}, "LBFGS does"),
        ({"target": "torch.optim.SparseAdam"}, "SparseAdam does not"),
        (lean({"target": "torch.optim.SGD", "params": {"momentum": -1}}), "Invalid momentum"),
        ({"target": "prodigyopt.Prodigy", "params": {"d0": -1.0}}, "Invalid d0"),
        (
            "prodigy",
            r"0.001 of it is next to nothing \(model.params.trainable.learning_rate.*learning_rate=1",
        ),
        (lean({"target": "prodigyopt.Prodigy"}), "next to nothing"),
        (lean("schedule_free"), "depends on all gradients"),
        (lean({"target": "schedulefree.RAdamScheduleFree"}), "depends on all gradients"),
    ],
)
def test_an_optimizer_that_cannot_train_is_refused_before_any_work(node: dict, message: str):
    with pytest.raises(UserError, match=message):
        check_optimizer(node, TrainerOptions(max_steps=3))


def test_prodigy_takes_one_rate_and_no_fused_backward_pass():
    options = TrainerOptions(max_steps=3)
    check_optimizer("prodigy", options, rates=[1.0, 1.0])
    check_optimizer("prodigy", options, rates=[1.0, 0.0])
    with pytest.raises(UserError, match="Setting different lr"):
        check_optimizer("prodigy", options, rates=[1.0, 0.5])
    with pytest.raises(UserError, match="depends on all gradients"):
        check_optimizer(lean("prodigy"), options, rates=[1.0])
    for name in ("lion", "adafactor"):
        check_optimizer(lean(name), options)


@pytest.mark.parametrize("package", ["prodigyopt", "schedulefree"])
def test_an_optimizer_whose_package_is_absent_says_how_to_get_it(
    package: str, monkeypatch: pytest.MonkeyPatch
):
    name = {"prodigyopt": "prodigy", "schedulefree": "schedule_free"}[package]
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"needs {package}, .*\[optimizers\]"):
        check_optimizer(name, TrainerOptions(max_steps=3))
    with pytest.raises(UserError, match=rf"no `{package}`.*\[optimizers\]"):
        check({"optimizer": {"target": SHORT[name]}}, {"optimizer": OptimizerNode})


def test_lion_is_its_algorithm_by_hand():
    """Algorithm 2: the sign of an interpolation, decoupled decay, then the average."""
    weights = [torch.tensor([0.5, -1.0, 2.0]), torch.tensor([[0.1]])]
    parameters = [nn.Parameter(w.clone()) for w in weights]
    optimizer = Lion([{"params": parameters, "lr": 0.01}], betas=(0.9, 0.99), weight_decay=0.5)
    averages = [torch.zeros_like(w) for w in weights]
    for step in range(4):
        draws = torch.Generator().manual_seed(step)
        for k, parameter in enumerate(parameters):
            g = torch.randn(weights[k].shape, generator=draws)
            parameter.grad = g.clone()
            c = 0.9 * averages[k] + 0.1 * g
            weights[k] = weights[k] - 0.01 * (torch.sign(c) + 0.5 * weights[k])
            averages[k] = 0.99 * averages[k] + 0.01 * g
        optimizer.step()
        for parameter, weight in zip(parameters, weights, strict=True):
            torch.testing.assert_close(parameter.detach(), weight, rtol=1e-6, atol=1e-7)
    parameters[0].grad = None  # what has no gradient stays
    kept = parameters[0].detach().clone()
    optimizer.step()
    assert torch.equal(parameters[0], kept)


@pytest.mark.parametrize("size", [2.0, 0.03, 0.0])
def test_adafactors_rate_is_relative_to_the_weights(size: float):
    """Shazeer & Stern 2018, algorithm 4: times their root mean square, 0.001 or the second eps at least."""
    for least, params in ((1e-3, {}), (0.05, {"eps": [None, 0.05]})):
        layer = nn.Linear(8, 8, bias=False)
        sign = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).sign()
        layer.weight.data = size * sign
        layer.weight.grad = 0.7 * sign
        build_optimizer(
            {"net": (layer, 1e-4)}, {"target": SHORT["adafactor"], "params": {"weight_decay": 0.0} | params}
        ).step()
        moved = (layer.weight.detach() - size * sign).square().mean().sqrt()
        assert float(moved) == pytest.approx(1e-4 * max(size, least), rel=2e-3 if size < 1 else 2e-2)


def test_a_fused_kernel_that_would_not_see_scaled_gradients_is_refused():
    scaled = TrainerOptions(max_steps=3, precision="16-mixed")
    check_optimizer("adamw", scaled)
    with pytest.raises(UserError, match="16-mixed.*optimizer=adamw"):
        check_optimizer({"target": SHORT["adamw"]}, scaled)
    fused = {"target": "torch.optim.AdamW", "params": {"fused": True}}
    with pytest.raises(UserError, match="16-mixed scales gradients, and AdamW would"):
        check_optimizer(fused, scaled)
    check_optimizer(fused, TrainerOptions(max_steps=3, precision="bf16-mixed"))
    check_optimizer({"target": "torch.optim.AdamW", "params": None}, scaled)
    assert state_bytes(torch.empty(10), {"target": "torch.optim.AdamW", "params": None}) == 2 * 4 * 10 + 4
