"""Runs on the CPU and on `second_device`, in a process of their own, for `test_second_device.py`.

    python -m tests.second_device_jobs JOBS.json RESULTS.json

JOBS: {"jobs": name -> words of a command line, "equal": names of those that the CPU does too}. Of each: what
stopped it, the tensors of its model that differ from the CPU's by more than rounding, by how much, and the
places in the code that brought something to the host in training steps, with how often.
"""

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.strategies import SingleDeviceStrategy
from safetensors.torch import load_file

from ldm.engine import device
from tests import second_device

TOLERANCE = 2e-7  # of weights of order 1: float32's rounding
CPU = torch.device("cpu")
place = CPU  # of the runs; modules that are imported from here on ask for it
device.device_of = lambda trainer: place
CPUAccelerator.setup_device = lambda self, device: None
SingleDeviceStrategy.root_device = property(lambda self: place)

from ldm.runs.job import run_job  # noqa: E402
from ldm.runs.options import parse  # noqa: E402


def trained(name: str, words: list[str], where: torch.device) -> dict[str, torch.Tensor]:
    """The weights that a run leaves."""
    global place
    place, name = where, f"{name}-{where.type}"
    run_job(parse([*words, f"name={name}"]))
    return load_file(f"logs/{name}/model.safetensors")


def compared(name: str, words: list[str], *, with_cpu: bool) -> dict[str, Any]:
    """What is said of a job."""
    second_device.in_steps.clear()
    try:
        found = trained(name, words, second_device.DEVICE)
        wanted = trained(name, words, CPU) if with_cpu else {}
    except Exception as error:
        ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "/ldm/" in frame.filename]
        return {"error": f"{place.type}: {str(error)[:300]} ({ours[-1].filename}:{ours[-1].lineno})"}
    apart = {key: (found[key] - w).abs().max().item() for key, w in wanted.items()}
    apart = {key: d for key, d in apart.items() if d > TOLERANCE}
    return {"error": None, "apart": apart, "in_steps": dict(second_device.in_steps)}


def refused() -> list[str]:
    """The names of what the device refuses, of things that a GPU does."""
    there, here, index = torch.ones(2, device=second_device.DEVICE), torch.ones(2), torch.tensor([0, 1])
    tried = {
        "sum": lambda: there + here,
        "product": lambda: torch.addmm(here, there[None], there[None].T),
        "index": lambda: here[index.to(second_device.DEVICE)],
        "values": lambda: there.index_put_((index,), here),
        "generator": lambda: torch.randn(2, device=second_device.DEVICE, generator=torch.Generator()),
        "number": lambda: there + torch.tensor(1.0),
        "index of the CPU": lambda: there[index],
        "copy": lambda: there.copy_(here),
    }
    found = []
    for name, act in tried.items():
        try:
            act()
        except RuntimeError:
            found.append(name)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = json.loads(Path(sys.argv[1]).read_text())
    results = {
        name: compared(name, words, with_cpu=name in given["equal"]) for name, words in given["jobs"].items()
    }
    Path(sys.argv[2]).write_text(json.dumps({"refused": refused(), "results": results}))
