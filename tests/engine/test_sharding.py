"""FSDP: two processes that each hold half of the weights learn what one learns, and are taken up exactly."""

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

ROOT = Path(__file__).resolve().parents[2]

WORKER = """
import shutil
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv.pop(1))
from torch.distributed.tensor import DTensor
from ldm.engine import distributed, sharding
from ldm.runs.job import run_job
from ldm.runs.options import parse

torch.set_num_threads(1)
shares = []

def gather(learner, gather=sharding.get_model_state_dict, **options):
    weights = [p for p in learner.parameters() if p.requires_grad]
    assert all(isinstance(p, DTensor) for p in weights)
    shares.append(sum(p.to_local().numel() for p in weights) / sum(p.numel() for p in weights))
    return gather(learner, **options)

sharding.get_model_state_dict = gather
config = parse(sys.argv[1:])
folder = Path("logs/two")
assert bool(run_job(config)) == (distributed.rank() == 0)
if distributed.rank() == 0:
    (folder / "model.safetensors").rename("straight.safetensors")
    for file in folder.glob("checkpoints/step-00000004*"):
        file.unlink()
distributed.barrier()
run_job(config, str(folder))
print(f"rank {distributed.rank()} held {shares[0]:.2f}, {shares[1]:.2f} of the weights", flush=True)
distributed.barrier()
distributed.leave()
"""


def test_two_halves_are_one_model(words: list[str], workdir: Path):
    """Weights of one process with a batch of two; a run taken up is the one never stopped, to the bit."""
    (workdir / "worker.py").write_text(WORKER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    two = ["name=two", "data.params.batch_size=1", "checkpoint_every=2", "trainer.strategy=fsdp"]
    command = [*torchrun, "worker.py", str(ROOT), *words, *two]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    shares = [float(share) for share in re.findall(r"0\.\d\d", done.stdout)]
    assert len(shares) == 4 and all(0.4 < share < 0.6 for share in shares)
    run_job(parse(words))

    one, two = (load_file(f"logs/{name}/model.safetensors") for name in ("one", "two"))
    base = load_file(OmegaConf.load("tiny.yaml").base_checkpoint)
    learned = torch.cat([(one[key] - base[key]).flatten() for key in one]).norm()
    apart = torch.cat([(one[key] - two[key]).flatten() for key in one]).norm()
    assert learned > 0.1 and apart < 0.01 * learned
    straight = load_file("straight.safetensors")
    assert [key for key in straight if not torch.equal(straight[key], two[key])] == []


def test_one_process_has_nothing_to_split(words: list[str]):
    with pytest.raises(UserError, match="over processes, and there is only one .trainer.strategy"):
        check_sharding(parse([*words, "trainer.strategy=fsdp"]))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("ema_decay=0.9", "ema_decay"),
        ("online_eval.every_steps=5", "online_eval.every_steps"),
        ("samples.every_steps=5", "samples.every_steps"),
        ("trainer.precision=16-mixed", "trainer.precision"),
        ("trainer.strategy=fsdp_cpu_offload", "trainer.strategy"),
        ("model.params.trainable.lora.target=ldm.models.lora.LoRA", "model.params.trainable.lora"),
        ("model.params.optimizer=adamw_bf16", "model.params.optimizer"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, words: list[str], change: str, key: str
):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    fsdp = [*words, "trainer.strategy=fsdp"]
    check_sharding(parse(fsdp))
    with pytest.raises(UserError, match=re.escape(key)):
        check_sharding(parse([*fsdp, change]))
