"""Distributed runs: process group, ranks and collectives.

Processes are started by torchrun or by Slurm's srun. All generate prior images and train; rank 0 alone writes
files.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
from pytorch_lightning.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from torch import distributed as dist

from ldm.engine.device import device_of
from ldm.errors import UserError
from ldm.schema import TrainerOptions

T = TypeVar("T")
LONGEST = timedelta(hours=2)  # timeout of the other ranks while rank 0 samples and evaluates


def launch(trainer: TrainerOptions) -> None:
    """Restarts this program under torchrun if the Trainer wants several devices and nothing started them."""
    count = device_count(trainer)
    if count > 1 and _environment() is None:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        os.execv(sys.executable, [sys.executable, *command, *sys.argv])


def device_count(trainer: TrainerOptions) -> int:
    """Number of devices of this machine that a Trainer with these options uses."""
    devices = trainer.devices
    if devices in ("auto", -1, "-1"):
        return 1 if trainer.accelerator == "cpu" else max(torch.cuda.device_count(), 1)
    if isinstance(devices, str) and not devices.isdigit():
        remedy = "Give a number, a list of numbers, or auto."
        raise UserError(f"{devices!r} is not a number of devices", where="trainer.devices", remedy=remedy)
    return int(devices) if isinstance(devices, int | str) else len(devices)


def process_count(trainer: TrainerOptions) -> int:
    """Number of processes of the run: those that there are, or those that `launch` will start."""
    return world_size() if dist.is_initialized() else max(world_size(), device_count(trainer))


def check_devices(trainer: TrainerOptions) -> None:
    """Raises UserError for devices that this machine lacks, and for nodes that nothing has started."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    present |= {"auto": True, "cpu": True, "gpu": any(present.values())}
    if not present[trainer.accelerator]:
        remedy = "Set trainer.accelerator=auto."
        raise UserError(f"There is no {trainer.accelerator} here", where="trainer.accelerator", remedy=remedy)
    kind, count, devices = device_of(trainer).type, device_count(trainer), trainer.devices
    if count < 1:
        what, remedy = f"{devices} is no number of devices", "Write 1 or more."
        raise UserError(what, where="trainer.devices", remedy=remedy)
    if kind != "cuda" and isinstance(devices, list):
        remedy = "Write a number; numbers of single devices are of CUDA's alone."
        raise UserError(f"A {kind} has no device {devices}", where="trainer.devices", remedy=remedy)
    here = torch.cuda.device_count()
    if kind == "cuda" and (max(devices) + 1 if isinstance(devices, list) else count) > here:
        raise UserError(f"There are {here} GPUs here, not {devices}", where="trainer.devices")
    if kind != "cuda" and trainer.precision == "16-mixed":
        remedy = "Set trainer.precision=32-true, or bf16-mixed."
        raise UserError(f"A {kind} has no mixed float16", where="trainer.precision", remedy=remedy)
    if trainer.num_nodes > 1 and _environment() is None:
        remedy = "Start it on every node with torchrun or srun, or take trainer.num_nodes off."
        raise UserError("There is one node here", where="trainer.num_nodes", remedy=remedy)


def join(trainer: TrainerOptions) -> TrainerOptions:
    """Joins the process group of the launcher, if any -> the Trainer's options for it.

    A single process has one device; Lightning would start the others with the same command line.
    """
    environment = _environment()
    if environment is None:
        if device_count(trainer) > 1:
            what = f"trainer.devices is {trainer.devices}, and this is the only process"
            raise UserError(what, where="trainer.devices", remedy="Start it with main.py, torchrun or srun.")
        is_all = trainer.devices in ("auto", -1, "-1")  # that is one here
        return replace(trainer, devices=1) if is_all else trainer
    given, here = trainer.devices, environment.world_size()
    if isinstance(given, list) and environment.local_rank() >= len(given):
        what = f"trainer.devices names {len(given)} GPUs, and the launcher has started more processes here"
        remedy = "Name one for each process, or write their number."
        raise UserError(what, where="trainer.devices", remedy=remedy)
    if not dist.is_initialized():
        init_process_group(environment, device_of(trainer))
    places = all_gather_object((environment.node_rank(), environment.local_rank()))
    nodes = len({node for node, _ in places})
    if trainer.num_nodes not in (1, nodes):
        what = f"The launcher has started {nodes} nodes, not {trainer.num_nodes}"
        raise UserError(what, where="trainer.num_nodes", remedy="Take it off.")
    return replace(
        trainer,
        devices=given[: here // nodes] if isinstance(given, list) else here // nodes,
        num_nodes=nodes,
        strategy="ddp" if trainer.strategy == "auto" else trainer.strategy,
    )


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


def leave() -> None:
    """Ends the process group and its threads; a process that exits with them running may abort.

    To be called when all work is done, not after an error, when others may still wait in a collective.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


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
