"""The check of what needs a GPU runs on a CPU, as far as it can, and its page says what there is."""

import importlib
import json
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import ours
from benchmarks.gpu import page
from benchmarks.gpu.check import PARTS, main

ROOT = Path(__file__).resolve().parent.parent
CPU = {"CHECK_DEVICE": "cpu", "CHECK_SIZE": "storybook"}


@pytest.fixture(scope="module")
def check() -> Iterator[ModuleType]:
    """`benchmarks.gpu.record` as it is on a CPU, its parts imported after it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CPU.items():
            patch.setenv(name, value)
        yield importlib.import_module("benchmarks.gpu.record")


@pytest.fixture
def results(check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that runs a part in this process and gives its results."""
    monkeypatch.setattr(check, "OUT", tmp_path)

    def run(part: str, *words: str) -> list[dict]:
        assert main(part, *words) == 0
        rows = page.read(tmp_path / "results.jsonl")
        assert {row["part"] for row in rows} == {part} and rows[-1]["what"] == "all of the part"
        assert [row["error"] for row in rows if "error" in row] == []
        return rows[:-1]

    return run


def test_every_part_is_a_function_and_has_a_limit_in_the_script(check: ModuleType):
    for part, module in PARTS.items():
        assert callable(getattr(importlib.import_module(f"benchmarks.gpu.{module}"), part)), part
    script = (ROOT / "benchmarks/gpu/check.sh").read_text(encoding="utf-8")
    assert set(re.findall(r"[\" ](\w+):\d+", script)) == {*PARTS, "gpu_tests"}


def test_the_script_runs_a_part_and_leaves_the_page(tmp_path: Path):
    env = os.environ | CPU | {"OUT": str(tmp_path)}
    line = ["bash", "benchmarks/gpu/check.sh", "600", "env"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(line, cwd=ROOT, env=env | {"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = page.read(tmp_path / "results.jsonl")
    assert [row["part"] for row in rows] == ["env"] * 3 and rows[1]["tflop_per_s"] > 0
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "**These figures are a CPU's**" in text and "## env" in text and (tmp_path / "gpu.svg").exists()


def test_steps_of_training(results):
    (row,) = results("train", "LoRA")
    assert row["what"] == "1+1, LoRA" and row["ms"] > 0 and row["batch"] == 2


def test_a_preset_and_its_forecast(results):
    training, encoding = results("caps", "8gb-lora")
    assert training["fits"] and encoding["fits"] and 0.001 < training["forecast_gib"] < 8


def test_the_forecast_of_stable_diffusion_is_that_of_the_memory_page(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    from benchmarks.gpu import training

    monkeypatch.setattr(training, "SIZE", "sd1")
    found = training.forecast("8gb-lora")
    assert {what: round(gib, 1) for what, gib in found.items()} == {"training": 2.2, "encoding 8 images": 2.8}


def test_what_does_not_fit_is_let_go_of_before_the_next_preset(
    results, check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from benchmarks.gpu import training

    alive: list[weakref.ref] = []

    class Large:
        def __init__(self):
            assert [ref for ref in alive if ref() is not None] == []
            alive.append(weakref.ref(self))
            self.cycle = self

        def serve(self, *given: object) -> None:
            raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(training, "preset", lambda name: Large())
    monkeypatch.setattr(training, "FITTED", {"training": training.FITTED["training"]})
    monkeypatch.setattr(training, "forecast", lambda name: {"training": 1.0})
    training.caps()
    assert len(alive) == len(training.CARDS)
    rows = page.read(tmp_path / "results.jsonl")
    assert [row["error"] for row in rows] == ["OutOfMemoryError: no"] * len(training.CARDS)


def test_a_forecast_that_fails_is_said_and_the_preset_is_tried(
    results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from benchmarks.gpu import training

    def fails(name: str) -> dict[str, float]:
        raise ValueError("no sum")

    monkeypatch.setattr(training, "forecast", fails)
    monkeypatch.setattr(training, "FITTED", {"training": lambda name: None})
    training.caps("12gb")
    said, tried = page.read(tmp_path / "results.jsonl")
    assert said["error"] == "ValueError: no sum" and tried["fits"] and "forecast_gib" not in tried


def test_peaks_count_from_an_empty_cache_and_times_from_a_full_one(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from benchmarks.gpu import training

    done: list[object] = []

    class Served:
        batches = SimpleNamespace(latent_stats=[0, 0])

        def serve(self, counts: Iterator[int], answer: Callable) -> None:
            for count in counts:
                done.append(count)
                answer(0.5 if count == 7 else 99.0)

    monkeypatch.setattr(check, "OUT", tmp_path)
    monkeypatch.setattr(check, "CUDA", True)
    monkeypatch.setattr(check, "memory", dict)
    monkeypatch.setattr(training, "memory", dict)
    monkeypatch.setattr(check, "reset_peak_memory", lambda: done.append("reset"))
    training.measure("this", Served(), steps=7)
    assert done == [training.WARM, "reset", 1, 7]
    assert page.read(tmp_path / "results.jsonl")[0]["ms"] == pytest.approx(500 / 7)


def test_every_tensor_of_a_batch_is_pinned_and_nothing_else(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    from benchmarks.gpu.storybook_base import pinned

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: f"pinned {int(tensor)}")
    one, two, three = torch.arange(1, 4)
    batch = {
        "item": one,
        "stream": ["subject"],
        "stream_masks": {"subject": two},
        "reference_items": [0, three],
    }
    assert pinned(batch) == {
        "item": "pinned 1",
        "stream": ["subject"],
        "stream_masks": {"subject": "pinned 2"},
        "reference_items": [0, "pinned 3"],
    }


class _Copies(TorchDispatchMode):
    """Counts what is copied from the CPU to the meta device, which stands for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = [t.device.type for t in tree_leaves(args) if isinstance(t, torch.Tensor) and t.dim()]
        is_there = isinstance(made, torch.Tensor) and made.device.type == "meta"
        self.count += is_there and "cpu" in given
        return made


def test_a_captured_step_copies_nothing_from_the_host(check: ModuleType):
    from benchmarks.gpu import agreement

    module = ours.build(ours.case_params(agreement.SMALL))
    batch = agreement._on("cpu", module, ours.Batches(module, size="storybook", batch=2)[0])
    assert torch.equal(agreement.losses_of(module, batch)(), module.loss_per_item(batch))
    module = module.to("meta")
    module.conditioner.forget()
    batch = agreement._on("meta", module, batch)
    losses = agreement.losses_of(module, batch)
    with _Copies() as captured:
        losses().mean().backward()
    with _Copies() as usual:
        module.loss_per_item(batch)
    assert captured.count == 0 and usual.count > 0


def test_a_copy_is_timed_while_the_queue_is_full(check: ModuleType, monkeypatch: pytest.MonkeyPatch):
    from benchmarks.gpu import environment

    done: list[str] = []

    class Copied:
        def to(self, device: str, *, non_blocking: bool) -> None:
            done.append("copy")

    monkeypatch.setattr(environment, "synchronize", lambda device: done.append("wait"))
    monkeypatch.setattr(environment.time, "perf_counter", lambda: done.append("clock") or len(done))
    ms = environment.copy_behind(lambda: done.append("work"), 3, Copied())
    assert done == ["work", "copy", "wait", "work", "work", "work", "clock", "copy", "clock", "wait"]
    assert ms == 2000.0


def test_what_needs_cuda_says_so(results):
    assert results("graph")[0]["skipped"] == "needs CUDA"


def test_it_agrees_with_itself_on_a_cpu(results):
    (row,) = results("agree", "float32")
    assert row["loss"] == row["gradient"] == 0.0


def test_sampling_and_its_profile(results):
    sampling, profile = results("sample", "batch 1")
    assert sampling["images_per_s"] > 0 and profile["wall_ms"] > 0


def test_drawing_and_training_of_the_base_are_timed_apart(results):
    *drawing, training = results("storybook_base")
    assert {row["what"] for row in drawing} >= {"drawing, processes: 1", "drawing, processes: 2"}
    assert min(row["cpu_ms_per_item"] for row in drawing) > 0
    assert training["items_per_s"] > 0


def test_the_program_s_own_steps_are_timed(results, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    step, waits = results("syncs", "without")
    assert step["ms"] > 0 and step["batch"] > 1 and waits["sites"] == {}


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture):
    assert main("everything") == 2
    assert "no part 'everything'" in capsys.readouterr().err


def test_a_failure_is_a_result(check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(check, "OUT", tmp_path)
    with check.attempt("this"):
        raise ValueError("no")
    assert page.read(tmp_path / "results.jsonl")[0]["error"] == "ValueError: no"


def test_the_page_in_the_repository_is_made_of_what_is_kept():
    results = page.read(page.KEPT)
    assert (ROOT / "benchmarks/gpu.md").read_text(encoding="utf-8") == page.page(results)
    assert (ROOT / "benchmarks/gpu.svg").read_text(encoding="utf-8") == page.picture(results)


def test_the_page_tells_a_gpu_s_figures_from_a_cpu_s(tmp_path: Path):
    rows = [
        {"part": "train", "what": "1+1, full", "ms": 41.26, "batch": 2, "peak_mib": 18000.5},
        {"part": "train", "what": "1+1, LoRA", "ms": 25.0, "peak_mib": 1792.0},
        {"part": "sample", "what": "sampling, batch 8", "ms": 1700.0, "images_per_s": 4.7},
        {"part": "caps", "what": "preset 12gb: training", "error": "OutOfMemoryError: x"},
        {"part": "syncs", "what": "waits", "sites": {"a.py:1 | b": 3}},
    ]
    gpu = [{"part": "env", "what": "versions", "gpu": "H100"}]
    text = page.page(gpu + rows)
    assert "Measured on: H100" in text
    assert "| ≤ 30 ms | none | 41.3 ms |" in text and "| ≤ 2 GiB | SimpleTuner 2.87 | 1.75 GiB |" in text
    assert "| ≤ 1.85 s | none | 1.7 s |" in text and "preset 12gb: training: fails" in text
    assert "a.py:1 / b: 3" in text and "OutOfMemoryError" in text
    assert "not yet" in page.page(rows) and "41.3 ms |" not in page.page(rows)
    drawn = page.picture(gpu + rows)
    assert "1+1, full" in drawn and "sampling, batch 8, an image" in drawn
    (tmp_path / "results.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    page.main(tmp_path / "results.jsonl", tmp_path)
    assert (tmp_path / "gpu.md").read_text(encoding="utf-8") == page.page(rows)
