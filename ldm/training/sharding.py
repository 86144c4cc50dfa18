"""FSDP: weights, gradients and optimizer states of the networks that learn, split over the processes.

For models whose training does not fit on one device (Rajbhandari et al. 2020, ZeRO-3; Zhao et al. 2023).
`trainer.strategy=fsdp` asks for it.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from ldm.errors import UserError
from ldm.training import distributed

FSDP = "fsdp"


class Sharded(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with checkpoints in one file, as those of a single process are."""

    def __init__(self) -> None:
        super().__init__(
            data_parallel_size=distributed.world_size(),
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            timeout=distributed.LONGEST,
        )


def shard(networks: Mapping[str, nn.Module], mesh: DeviceMesh) -> None:
    """Leaves each process its share of the networks that learn; a block is whole only while it computes."""
    blocks = {
        "unet": lambda unet: [*unet.input_blocks, unet.middle_block, *unet.output_blocks],
        "text_encoder": lambda text: text.transformer["text_model"].encoder.layers,
    }
    for name, network in networks.items():
        if any(p.requires_grad for p in network.parameters()):
            network.to(memory_format=torch.contiguous_format)  # FSDP splits no other layout
            for block in [*blocks[name](network), network]:
                fully_shard(block, mesh=mesh)


@contextmanager
def fsdp_replica(
    module: pl.LightningModule, trainer: Mapping[str, Any]
) -> Iterator[tuple[pl.LightningModule, Mapping[str, Any]]]:
    """What is trained, and the Trainer's arguments: for FSDP a copy of the module, to be split.

    The module itself stays whole, waits on the CPU and, in the first process, takes what the copy learned.
    """
    if trainer.get("strategy") != FSDP:
        yield module, trainer
        return
    learner = copy.deepcopy(module)
    for name in ("unet", "text_encoder"):
        module.networks[name].cpu()
    yield learner, {**trainer, "strategy": Sharded()}
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(learner, options=whole)
    if distributed.rank() == 0:
        module.load_state_dict(state)


def check_sharding(plain: Mapping[str, Any]) -> None:
    """Refuses what needs whole networks in one process while they are split, or another AdamW."""
    strategy, params = str(plain["trainer"].get("strategy")), plain["model"].get("params", {})
    if not strategy.startswith(FSDP):
        return
    if strategy != FSDP:
        raise UserError(f"`{strategy}` is not known", where="trainer.strategy", remedy="Write fsdp.")
    if distributed.world_size() == 1:
        what, remedy = (
            "FSDP splits a model over processes, and this is one",
            "Set trainer.devices, or take it off.",
        )
        raise UserError(what, where="trainer.strategy", remedy=remedy)
    refused = {
        "ema_decay": plain.get("ema_decay") is not None,
        "online_eval.every_steps": bool(plain.get("online_eval", {}).get("every_steps")),
        "samples.every_steps": bool(plain.get("samples", {}).get("every_steps")),
        "trainer.precision": str(plain["trainer"].get("precision")).startswith("16"),
        "model.params.optimizer": params.get("optimizer", "adamw") != "adamw",
        **{
            f"model.params.{key}": bool(params.get(key))
            for key in ("lora", "l2_sp_weight", "compile", "learned_token")
        },
    }
    found = ", ".join(key for key, present in refused.items() if present)
    if found:
        remedy = "Take it off, or train with trainer.strategy=ddp."
        raise UserError("FSDP does not go with all that the config asks for", where=found, remedy=remedy)
