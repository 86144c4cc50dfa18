"""FSDP: weights, gradients and optimizer states of trainable networks, sharded over the processes.

For models whose training does not fit on one device (Rajbhandari et al. 2020, ZeRO-3; Zhao et al. 2023).
`trainer.strategy=fsdp` asks for it.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from ldm.engine import distributed
from ldm.errors import UserError
from ldm.schema import RunConfig, TrainerOptions

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
        "text_encoder": lambda text: text.layers,
    }
    for name, network in networks.items():
        if any(p.requires_grad for p in network.parameters()):
            network.to(memory_format=torch.contiguous_format)  # FSDP shards no other layout
            for block in [*blocks[name](network), network]:
                fully_shard(block, mesh=mesh)


@contextmanager
def fsdp_replica(
    module: pl.LightningModule, options: TrainerOptions
) -> Iterator[tuple[pl.LightningModule, dict[str, Any]]]:
    """Yields the module to train and the Trainer's arguments; with FSDP the module is a copy, to be sharded.

    The original stays whole, on the CPU, and gets the trained weights on rank 0.
    """
    trainer = asdict(options)
    if options.strategy != FSDP:
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


def check_sharding(config: RunConfig) -> None:
    """Raises UserError for FSDP with settings that need whole networks or another optimizer."""
    if config.trainer.strategy != FSDP:
        return
    if distributed.process_count(config.trainer) == 1:
        what = "FSDP shards a model over processes, and there is only one"
        raise UserError(what, where="trainer.strategy", remedy="Set trainer.devices, or take it off.")
    params = config.model.get("params") or {}
    objective, trainable = params.get("objective") or {}, params.get("trainable") or {}
    refused = {
        "ema_decay": config.ema_decay is not None,
        "online_eval.every_steps": bool(config.online_eval.every_steps),
        "samples.every_steps": bool(config.samples.every_steps),
        "trainer.precision": config.trainer.precision == "16-mixed",
        "model.params.optimizer": params.get("optimizer", "adamw") != "adamw",
        "model.params.compile": bool(params.get("compile")),
        **{
            f"model.params.trainable.{key}": bool(trainable.get(key))
            for key in ("lora", "adapter", "learned_token")
        },
        "model.params.objective.l2_sp_weight": bool(objective.get("l2_sp_weight")),
    }
    found = ", ".join(key for key, present in refused.items() if present)
    if found:
        remedy = "Take it off, or train with trainer.strategy=ddp."
        raise UserError("FSDP does not support this setting", where=found, remedy=remedy)
