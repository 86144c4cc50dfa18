"""Distributed runs: process group, ranks and collectives.

Processes are started by torchrun or by Slurm's srun. All generate prior images and train; rank 0 alone writes
files.
"""

import os
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
from pytorch_lightning.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from torch import distributed as dist

from ldm.errors import UserError
from ldm.training.device import device_of

T = TypeVar("T")
LONGEST = timedelta(hours=2)  # timeout of the other ranks while rank 0 samples and evaluates


def launch(trainer: Mapping[str, Any]) -> None:
    """Restarts this program under torchrun if the Trainer wants several devices and nothing started them."""
    count = device_count(trainer)
    if count > 1 and _environment() is None:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        os.execv(sys.executable, [sys.executable, *command, *sys.argv])


def device_count(trainer: Mapping[str, Any]) -> int:
    """Number of devices of this machine that a Trainer with these arguments uses; 1 by default."""
    devices = trainer.get("devices", 1)
    if devices in ("auto", -1, "-1"):
        return 1 if trainer.get("accelerator") == "cpu" else max(torch.cuda.device_count(), 1)
    if isinstance(devices, str) and not devices.isdigit():
        remedy = "Give a number, a list of numbers, or auto."
        raise UserError(f"{devices!r} is not a number of devices", where="trainer.devices", remedy=remedy)
    return int(devices) if isinstance(devices, int | str) else len(devices)


def join(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Joins the process group of the launcher, if any -> the Trainer's arguments for it.

    A single process gets `devices=1`: by default a Trainer takes all devices and starts its own processes.
    """
    environment = _environment()
    if environment is None:
        return {"devices": 1, **trainer}
    if not dist.is_initialized():
        init_process_group(environment, device_of(trainer))
    given, here = trainer.get("devices"), environment.world_size()
    places = all_gather_object((environment.node_rank(), environment.local_rank()))
    nodes = len({node for node, _ in places})
    strategy = trainer.get("strategy", "auto")
    return {
        **trainer,
        "devices": given if isinstance(given, list) and len(given) == here // nodes else here // nodes,
        "num_nodes": nodes,
        "strategy": "ddp" if strategy == "auto" else strategy,
    }


def init_process_group(environment: TorchElasticEnvironment | SLURMEnvironment, device: torch.device) -> None:
    """Initializes torch.distributed, with gloo for objects and NCCL for tensors on a GPU."""
    os.environ["MASTER_ADDR"] = environment.main_address
    os.environ["MASTER_PORT"] = str(environment.main_port)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        rank=environment.global_rank(),
        world_size=environment.world_size(),
        timeout=LONGEST,
    )


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Waits for all processes."""
    if dist.is_initialized():
        all_gather_object(None)


def all_gather_object(value: T) -> list[T]:
    """The values of all processes, by rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_rank0_broadcast(make: Callable[[], T]) -> T:
    """Calls a function on rank 0 -> its result, on all ranks."""
    return all_gather_object(make() if rank() == 0 else None)[0]


def _environment() -> TorchElasticEnvironment | SLURMEnvironment | None:
    """The launcher of this process; None for a single process."""
    kinds = (TorchElasticEnvironment, SLURMEnvironment)  # torchrun may run inside a Slurm job
    found = next((kind() for kind in kinds if kind.detect()), None)
    return found if found is not None and found.world_size() > 1 else None
