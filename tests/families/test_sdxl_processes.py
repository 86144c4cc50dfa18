"""SDXL on two processes: DDP of one item each is one process of two; FSDP's halves are one, and resume."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from ldm.engine import distributed
from ldm.engine.sharding import check_sharding
from ldm.errors import UserError
from ldm.runs.job import run_job
from ldm.runs.options import parse
from tests.families import tiny_sdxl

ROOT = Path(__file__).resolve().parents[2]

WORKER = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv.pop(1))
from ldm.engine import distributed
from ldm.runs.job import run_job
from ldm.runs.options import parse

torch.set_num_threads(1)
words = [*sys.argv[1:], "data.params.batch_size=1"]
assert bool(run_job(parse([*words, "name=two"]))) == (distributed.rank() == 0)
halves = [*words, "name=halves", "trainer.strategy=fsdp", "checkpoint_every=1"]
run_job(parse(halves))
folder = Path("logs/halves")
distributed.barrier()
if distributed.rank() == 0:
    (folder / "model.safetensors").rename("straight.safetensors")
    for file in folder.glob("checkpoints/step-00000002*"):
        file.unlink()
distributed.barrier()
run_job(parse(halves), str(folder))
distributed.barrier()
distributed.leave()
"""


def test_two_processes_are_one(workdir: Path, xl_file: Path, subject_folder: Path):
    """Everything learns, with prior images, the teacher and held empty prompts; crops differ by item."""
    config = tiny_sdxl.run_config(xl_file, subject_folder, name="one", trainer={"max_steps": 2})
    OmegaConf.save(OmegaConf.create(config), "tiny.yaml")
    Path("worker.py").write_text(WORKER)
    words = ["--base", "tiny.yaml"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, "worker.py", str(ROOT), *words], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    run_job(parse(words))

    base = load_file(xl_file)
    one, two, halves = (load_file(f"logs/{name}/model.safetensors") for name in ("one", "two", "halves"))

    def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], prefix: str) -> torch.Tensor:
        return torch.cat([(a[key] - b[key]).flatten() for key in a if key.startswith(prefix)]).norm()

    for network in ("model.diffusion_model.", "conditioner.embedders.0.", "conditioner.embedders.1."):
        learned = distance(one, base, network)
        assert learned > 0.05
        for other in (two, halves):  # AdamW makes steps of rounding where a gradient is 0
            assert distance(one, other, network) < 0.02 * learned, network
    straight = load_file("straight.safetensors")
    assert [key for key in straight if not torch.equal(straight[key], halves[key])] == []


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ([], "model.params.trainable.lora"),
        (["model.params.trainable.lora=null", "ema_decay=0.9"], "ema_decay"),
        (["configs/presets/sdxl-24gb.yaml"], "model.params.optimizer"),
    ],
)
def test_fsdp_refuses_by_key_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch, change: list[str], key: str):
    """Of the shipped config and presets; full training in float32 is what it is for."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.chdir(ROOT)
    presets = [word for word in change if word.endswith(".yaml")]
    rest = [word for word in change if not word.endswith(".yaml")]
    words = ["--base", "configs/dreambooth-sdxl.yaml", *presets, *rest, "trainer.strategy=fsdp"]
    words += ["data.params.subject_root=photos", "data.params.class_word=dog"]
    with pytest.raises(UserError, match=re.escape(key)):
        check_sharding(parse(words))
    whole = ["--base", "configs/dreambooth-sdxl.yaml", "configs/presets/sdxl-80gb.yaml", *words[-2:]]
    check_sharding(parse([*whole, "trainer.strategy=fsdp", "trainer.devices=2"]))
