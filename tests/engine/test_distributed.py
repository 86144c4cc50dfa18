"""Several processes: two with a batch of one each are one with a batch of two; prior images are shared."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from ldm.engine import distributed
from ldm.errors import UserError
from ldm.reports.curves import read_curves
from ldm.runs.job import run_job
from ldm.runs.options import parse
from ldm.schema import TrainerOptions
from tests.factories import masks, photos, with_concepts

ROOT = Path(__file__).resolve().parents[2]

WORKER = """
import sys
import torch
sys.path.insert(0, sys.argv.pop(1))
from ldm.engine import distributed
from ldm.runs.job import run_job
from ldm.runs.options import parse
from ldm.runs.generate_set import generate_set

torch.set_num_threads(1)
config = parse(sys.argv[1:])
if "data.params.num_priors=0" not in sys.argv:
    generate_set(config)
left = run_job(config)
assert bool(left) == (distributed.rank() == 0)
if distributed.rank() == 1:
    raise SystemExit("rank 1 says so")
distributed.leave()
"""


KEEPING = [  # ways to keep the class together, on a T-LoRA
    "data.params.num_priors=0",
    "data.params.diff_output_preservation=true",
    "model.params.objective.prior_target=teacher",
    "model.params.objective.l2_sp_weight=0.1",
    "model.params.objective.subject_loss.target=ldm.training.dco.DCO",
    "model.params.trainable.lora.target=ldm.models.lora.LoRA",
    "model.params.trainable.lora.params.rank_by_timestep.min_rank=1",
    "model.params.trainable.learning_rate=0.1",
    "model.params.optimizer.target=torch.optim.SGD",  # AdamW steps by rounding, too
]


ADAPTER = [  # by lycoris-lora, without prior images
    "data.params.num_priors=0",
    "model.params.objective.prior_target=teacher",
    "model.params.trainable.adapter.kind=lokr",
    "model.params.trainable.adapter.rank=2",
    "model.params.trainable.learning_rate=0.1",
    "model.params.optimizer.target=torch.optim.SGD",
]


BUCKETS = ["data.params.buckets={}", "data.params.num_priors=5"]  # three shapes


CASES = {
    "as ever": [],
    "keeping the class": KEEPING,
    "an adapter": ADAPTER,
    "several": [],
    "buckets": BUCKETS,
}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_of_one_item_are_one_rank_of_two(words: list[str], workdir: Path, case: str):
    if case == "an adapter":
        pytest.importorskip("lycoris", reason="needs lycoris-lora, whose adapter it is")
    (workdir / "worker.py").write_text(WORKER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    keeping = case in ("keeping the class", "an adapter")
    words = [*words, "data.params.prior_caption_dropout=0.5", *CASES[case]]
    if case == "as ever":
        masks(Path(OmegaConf.load("tiny.yaml").data.params.subject_root))
        words.append("model.params.objective.masks={outside: 0.5, outside_target: teacher}")
    if case == "several":
        words.append(with_concepts("tiny.yaml", photos(workdir / "rings")))
    two = ["name=two", "data.params.batch_size=1", "priors.folder=shared"]
    command = [*torchrun, "worker.py", str(ROOT), *words, *two]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "rank 1 says so" in done.stderr and done.returncode != 0, done.stderr
    run_job(parse(words))

    one, two = (load_file(f"logs/{name}/model.safetensors") for name in ("one", "two"))
    base = load_file(OmegaConf.load("tiny.yaml").base_checkpoint)
    learned = torch.cat([(one[key] - base[key]).flatten() for key in one]).norm()
    apart = torch.cat([(one[key] - two[key]).flatten() for key in one]).norm()
    assert learned > (1e-3 if keeping else 0.1)
    assert apart < 0.01 * learned  # AdamW makes steps of rounding where a gradient is 0
    curves = [read_curves(Path(f"logs/{name}/tensorboard")) for name in ("one", "two")]
    for name in ("train/loss", "train/subject_loss", "train/prior_loss", "val/loss"):
        (steps, losses), (steps_two, losses_two) = (zip(*curve[name], strict=True) for curve in curves)
        assert steps == steps_two
        assert losses == pytest.approx(losses_two, rel=1e-4, abs=1e-11)

    names = {path.name for path in Path("logs").iterdir()}
    assert names == {"one", "two"}  # two processes, one folder
    if keeping:
        assert not Path("priors").exists()
        return
    sets = sorted(path.name for path in Path("priors").iterdir())
    assert len(sets) == {"several": 2, "buckets": 3}.get(case, 1)
    assert sets == sorted(path.name for path in Path("shared").iterdir())
    for mine, shared in ((Path("priors", name), Path("shared", name)) for name in sets):
        assert sorted(p.name for p in mine.iterdir()) == sorted(p.name for p in shared.iterdir())
        assert json.loads((shared / "manifest.json").read_text()) == json.loads(
            (mine / "manifest.json").read_text()
        )


def test_alone_there_is_nobody_to_meet():
    distributed.leave()
    for devices, joined in ((1, 1), ("auto", 1), ([2], [2])):
        options = TrainerOptions(max_steps=3, accelerator="cpu", devices=devices)
        assert distributed.join(options) == replace(options, devices=joined)
    for more in ({"devices": 2}, {"num_nodes": 2}):
        with pytest.raises(UserError, match=next(iter(more))):
            options = TrainerOptions(max_steps=3, accelerator="cpu", **more)
            distributed.check_devices(options)
            distributed.join(options)
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.all_gather_object("x") == ["x"] and distributed.on_rank0_broadcast(lambda: "y") == "y"
    distributed.barrier()


def test_more_processes_than_gpus_that_are_named_are_refused(monkeypatch: pytest.MonkeyPatch):
    """Before the third has no number of its own."""
    place = SimpleNamespace(local_rank=lambda: 2, world_size=lambda: 4)
    monkeypatch.setattr(distributed, "_environment", lambda: place)
    with pytest.raises(UserError, match=r"names 2 GPUs.*more processes here \(trainer.devices\)"):
        distributed.join(TrainerOptions(max_steps=1, devices=[2, 3]))


@pytest.mark.parametrize("devices", [1, "1", "auto", [0], -1])
def test_one_device_starts_nothing_else(devices: object):
    distributed.launch(TrainerOptions(max_steps=1, devices=devices, accelerator="cpu"))  # returns


def test_all_devices_are_those_that_are_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)

    def count(**options: object) -> int:
        return distributed.device_count(TrainerOptions(max_steps=1, **options))

    assert [count(devices=n) for n in ("auto", -1, 2, "3", [0, 2])] == [4, 4, 2, 3, 2]
    with pytest.raises(UserError, match="'two' is not a number of devices .*a number"):
        count(devices="two")
    assert count() == count(devices="auto", accelerator="cpu") == 1


def test_several_devices_start_torchrun(monkeypatch: pytest.MonkeyPatch):
    started = []
    monkeypatch.setattr("os.execv", lambda program, command: started.append(command))
    monkeypatch.setattr("sys.argv", ["main.py", "--base", "a.yaml"])
    distributed.launch(TrainerOptions(max_steps=1, devices=[0, 1, 3]))
    assert started == [
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
        + ["main.py", "--base", "a.yaml"]
    ]
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GROUP_RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    distributed.launch(TrainerOptions(max_steps=1, devices=3))  # is one of them
    assert len(started) == 1
