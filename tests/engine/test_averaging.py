"""The moving average of the weights: Lightning's own to rounding, of what learns alone, exact on resume."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch import Tensor, nn

from ldm.engine.averaging import WeightAverage, evaluated_weights
from ldm.errors import UserError
from tests.short_runs import At, Job, Killed, differences, kill, state_of

DECAY = 0.9


@pytest.mark.parametrize("every", [1, 2])
def test_it_is_lightnings_average_to_rounding(job: Job, tmp_path: Path, every: int):
    """Within 2 ulp of the largest weight; where its updates lie n steps apart it decays by d^n."""
    job.steps = 7
    ours = job(tmp_path / "ours", ema_decay=DECAY, ema_every=every)
    callback = EMAWeightAveraging(decay=DECAY**every, update_every_n_steps=every, use_buffers=False)
    theirs = job(tmp_path / "theirs", callbacks=[callback])
    raw = job(tmp_path / "raw")
    unlike = 0
    for (name, a), b, c in zip(ours.named_parameters(), theirs.parameters(), raw.parameters(), strict=True):
        torch.testing.assert_close(
            a, b, rtol=4 * 2**-24, atol=4 * 2**-24 * float(b.detach().abs().max()), msg=name
        )
        unlike += a.requires_grad and not torch.equal(a, c)
    assert unlike > 100
    kept, wanted = (state_of(tmp_path / name, 7) for name in ("ours", "theirs"))
    assert kept["state_dict"].keys() == wanted["state_dict"].keys()
    assert differences(kept["current_model_state"], wanted["current_model_state"]) == []
    assert differences(kept["optimizer_states"], wanted["optimizer_states"]) == []


def test_its_closed_form():
    """Of weights 1, 2, 3, ... at steps 1, 2, 3, ...: sum of d^k and the first one's rest."""
    average, trainer = on(layer := nn.Linear(1, 1, bias=False), decay=0.5)
    for step in range(1, 5):
        nn.init.constant_(layer.weight, step)
        trainer.global_step = step
        average.on_train_batch_end(trainer, layer, None, {}, step - 1)
    assert average.averages["weight"].item() == (((1 + 2) / 2 + 3) / 2 + 4) / 2
    trainer.global_step = 4  # a micro-batch that ends no step
    average.on_train_batch_end(trainer, layer, None, {}, 4)
    assert average.updates == 4


class Steps:
    """All that the average asks of a Trainer."""

    global_step = 0


def on(module: nn.Module, **options: object) -> tuple[WeightAverage, Steps]:
    module.device = next(module.parameters()).device
    average, trainer = WeightAverage(**options), Steps()
    average.setup(trainer, module, "fit")
    average.on_fit_start(trainer, module)
    return average, trainer


def test_frozen_weights_are_neither_averaged_nor_written_twice(job: Job, tmp_path: Path):
    seen: dict[str, object] = {}

    class Look(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            seen["names"] = set(next(c for c in trainer.callbacks if isinstance(c, WeightAverage)).averages)
            seen["learning"] = {name for name, p in module.named_parameters() if p.requires_grad}

    job(tmp_path, callbacks=[Look()], ema_decay=DECAY, params={"trainable": {"text_encoder": False}})
    assert seen["names"] == seen["learning"]
    assert all(name.startswith("model.diffusion_model.") for name in seen["names"])
    state = state_of(tmp_path, 4)
    frozen = "first_stage_model.quant_conv.weight"
    pointers = [
        state[key][frozen].untyped_storage().data_ptr() for key in ("state_dict", "current_model_state")
    ]
    assert pointers[0] == pointers[1]


def apart(patch: pytest.MonkeyPatch) -> None:
    """As if the weights lay on another device: through a copy of them and a thread."""
    patch.setattr(WeightAverage, "_is_apart", property(lambda self: self.device is not None))


def test_an_average_on_another_device_is_the_same(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    here = job(tmp_path / "here", ema_decay=DECAY)
    apart(monkeypatch)
    there = job(tmp_path / "there", ema_decay=DECAY, ema_device="cpu")
    assert differences(here.state_dict(), there.state_dict()) == []
    assert differences(state_of(tmp_path / "here", 3), state_of(tmp_path / "there", 3)) == []
    for micro_batch in (1, 3):
        with pytest.raises(Killed):
            job(tmp_path / "again", callbacks=[At(micro_batch, kill)], ema_decay=DECAY, ema_device="cpu")
    again = job(tmp_path / "again", ema_decay=DECAY, ema_device="cpu")
    assert differences(here.state_dict(), again.state_dict()) == []


def after_a_step(
    monkeypatch: pytest.MonkeyPatch, update: Callable[[WeightAverage, list[Tensor]], None]
) -> tuple[WeightAverage, Steps, nn.Module]:
    """An average apart from the weights, which its thread begins to update so; its trainer and module."""
    apart(monkeypatch)
    monkeypatch.setattr(WeightAverage, "_update", update)
    layer = nn.Linear(2, 2)
    average, trainer = on(layer, decay=DECAY, device="cpu")
    trainer.global_step = 1
    average.on_train_batch_end(trainer, layer, None, {}, 0)
    return average, trainer, layer


def test_the_count_of_updates_is_that_of_the_averages(monkeypatch: pytest.MonkeyPatch):
    """However late the thread is: a checkpoint asks for the count before it asks for the averages."""
    update = WeightAverage._update

    def late(self: WeightAverage, weights: list[Tensor]) -> None:
        time.sleep(0.2)
        update(self, weights)

    average, *_ = after_a_step(monkeypatch, late)
    assert average.state_dict() == {"updates": 1, "latest_step": 1}


def test_an_error_in_the_thread_is_raised(monkeypatch: pytest.MonkeyPatch):
    def fail(self: WeightAverage, weights: list[Tensor]) -> None:
        raise MemoryError("no room")

    average, trainer, layer = after_a_step(monkeypatch, fail)
    with pytest.raises(MemoryError, match="no room"):
        average.on_save_checkpoint(trainer, layer, {"state_dict": {}})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_validation_and_previews_see_the_average_and_training_does_not(dtype: torch.dtype):
    layer = nn.Linear(3, 3).to(dtype)
    average, trainer = on(layer, decay=0.999)
    before = layer.weight.detach().clone()
    for step in (1, 2):
        nn.init.constant_(layer.weight, step)
        trainer.global_step = step
        average.on_train_batch_end(trainer, layer, None, {}, step)
    live, trainer.callbacks = layer.weight.data, [average]
    with torch.inference_mode():
        average.on_validation_start(trainer, layer)
        expected = torch.full((3, 3), 1.001)
        assert torch.equal(layer.weight, expected.to(dtype)) and not torch.equal(layer.weight, before)
        average.on_validation_end(trainer, layer)
    assert layer.weight.data_ptr() == live.data_ptr() and (layer.weight == 2).all()
    with pytest.raises(Killed), evaluated_weights(trainer):
        assert torch.equal(layer.weight, expected.to(dtype))
        raise Killed
    assert layer.weight.data_ptr() == live.data_ptr()
    assert torch.equal(average.averages["weight"], expected)  # float32: bfloat16 would have stood still
    layer.weight.sum().backward()
    average.on_train_end(trainer, layer)
    assert torch.equal(layer.weight, expected.to(dtype)) and layer.weight.dtype == dtype


def test_validation_is_of_the_average(job: Job, tmp_path: Path):
    """What a validation of Lightning's average logs, to rounding; and not of the weights being trained."""
    logged: dict[str, list[float]] = {"ours": [], "theirs": [], "raw": []}

    def look(name: str) -> pl.Callback:
        class Look(pl.Callback):
            def on_validation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
                logged[name].append(float(trainer.callback_metrics["val/loss"]))

        return Look()

    job(tmp_path / "ours", callbacks=[look("ours")], ema_decay=DECAY)
    theirs = EMAWeightAveraging(decay=DECAY, use_buffers=False)
    job(tmp_path / "theirs", callbacks=[look("theirs"), theirs])
    job(tmp_path / "raw", callbacks=[look("raw")])
    assert logged["ours"] == pytest.approx(logged["theirs"], rel=1e-6)
    assert logged["ours"] != pytest.approx(logged["raw"], rel=1e-6)


def test_a_run_without_an_average_goes_on_with_one(job: Job, tmp_path: Path):
    job.steps = 2
    job(tmp_path)
    job.steps = 4
    job(tmp_path, ema_decay=DECAY)
    assert state_of(tmp_path, 4)["callbacks"]["WeightAverage"] == {"updates": 2, "latest_step": 4}


@pytest.mark.parametrize(
    "make, key",
    [
        (lambda: WeightAverage(decay=1.5), "ema_decay"),
        (lambda: WeightAverage(decay=0.9, every=0), "ema_every"),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], WeightAverage], key: str):
    with pytest.raises(UserError, match=key):
        make()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_average_on_the_cpu_of_weights_on_a_gpu_is_the_same():
    found = []
    for device in (None, "cpu"):
        torch.manual_seed(0)
        layer = nn.Linear(512, 512).cuda()
        average, trainer = on(layer, decay=DECAY, device=device)
        for step in range(1, 6):
            average.on_before_backward(trainer, layer, torch.zeros(()))
            with torch.no_grad():
                layer.weight.add_(0.01 * step)
            trainer.global_step = step
            average.on_train_batch_end(trainer, layer, None, {}, step)
        average.on_train_end(trainer, layer)
        found.append(layer.weight.detach().cpu())
    torch.testing.assert_close(*found, rtol=4 * 2**-24, atol=0)
