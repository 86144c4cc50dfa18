"""FSDP: weights, gradients and optimizer states of trainable networks, sharded over the processes.

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
    """FSDP2 as a Lightning strategy; checkpoints are single files, as without it."""

    def __init__(self) -> None:
        super().__init__(
            data_parallel_size=distributed.world_size(),
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            timeout=distributed.LONGEST,
        )


def shard(networks: Mapping[str, nn.Module], mesh: DeviceMesh) -> None:
    """Shards the trainable networks; each block is gathered only while it computes."""
    blocks = {
        "unet": lambda unet: [*unet.input_blocks, unet.middle_block, *unet.output_blocks],
        "text_encoder": lambda text: text.transformer["text_model"].encoder.layers,
    }
    for name, network in networks.items():
        if any(p.requires_grad for p in network.parameters()):
            network.to(memory_format=torch.contiguous_format)  # FSDP shards no other layout
            for block in [*blocks[name](network), network]:
                fully_shard(block, mesh=mesh)


@contextmanager
def fsdp_replica(
    module: pl.LightningModule, trainer: Mapping[str, Any]
) -> Iterator[tuple[pl.LightningModule, Mapping[str, Any]]]:
    """Yields the module to train and the Trainer's arguments; with FSDP the module is a copy, to be sharded.

    The original stays whole, on the CPU, and gets the trained weights on rank 0.
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
    """Raises UserError for FSDP with settings that need whole networks or another optimizer."""
    strategy, params = str(plain["trainer"].get("strategy")), plain["model"].get("params", {})
    if not strategy.startswith(FSDP):
        return
    if strategy != FSDP:
        raise UserError(f"`{strategy}` is not known", where="trainer.strategy", remedy="Write fsdp.")
    if distributed.world_size() == 1:
        what, remedy = (
            "FSDP shards a model over processes, and there is only one",
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
        raise UserError("FSDP does not support this setting", where=found, remedy=remedy)
