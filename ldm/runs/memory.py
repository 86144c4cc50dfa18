"""What a run will need, before it begins: bytes of weights, gradients, optimizer states, activations, disk.

Weights and states are exact. Activations are what the graph of one forward pass saves, counted on tensors
without data; kernels' work space and the CUDA context (about 500 MiB) come on top.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from ldm.config import instantiate, param_of, takes, with_params
from ldm.data.dreambooth import DreamBoothDataModule
from ldm.data.latents import views_at_once
from ldm.engine.distributed import device_count
from ldm.engine.peak import PeakBytes
from ldm.engine.sharding import FSDP
from ldm.models.conditioning import Conditioning
from ldm.optim.fused_backward import pending_gradient_bytes
from ldm.optim.optimizer_nodes import averages_weights, steps_in_backward
from ldm.optim.sizes import checkpoint_bytes, state_bytes
from ldm.runs.before_after import evaluation_nodes
from ldm.runs.buckets import build_data
from ldm.runs.disk import checkpoints_to_come
from ldm.schema import RunConfig
from ldm.training.latent_diffusion import LatentDiffusion
from ldm.training.techniques import AUTOCAST, cast_by_autocast

MIB = 2**20
WIDTHS = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Need:
    """Bytes of one part while it trains."""

    weights: int = 0
    gradients: int = 0
    states: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def estimate(config: RunConfig) -> tuple[dict[str, Need], dict[str, int]]:
    """A config of DreamBooth -> (bytes of each part on the device, bytes of each kind of file)."""
    trainer, module = config.trainer, module_on_meta(config)
    data: DreamBoothDataModule = build_data(config, module)
    with FakeTensorMode():  # of the CPU, where autocast applies; the meta device knows none
        activations = _activations(module, data, precision=trainer.precision)
    graphs = len(data.buckets_in_use.shapes) if module.cuda_graph else 1  # each keeps its memory
    needs, lean = {}, steps_in_backward(module.optimizer)
    holders = module.networks | ({} if module.lora is None else {"lora": module.lora})
    for name, network in holders.items():
        learning = _learning(network)
        needs[name] = Need(
            weights=_size(network.state_dict().values()),
            gradients=0 if lean else graphs * _size(learning),
            states=sum(state_bytes(p, module.optimizer) for p in learning),
            activations=graphs * activations.get(name, 0),
        )
    if lean:  # those that wait, and the one that comes last
        learning = _learning(module)
        waiting = pending_gradient_bytes(learning) + max((p.nbytes for p in learning), default=0)
        needs["unet"] = Need(**{**vars(needs["unet"]), "gradients": waiting})
    average = _average(config, module, needs)
    disk = _disk(config, module, data)
    if trainer.strategy == FSDP:
        needs |= {name: _share(need, device_count(trainer)) for name, need in needs.items() if need.states}
    if data.cache_latents and not data.online_priors:
        del needs["vae"]
    if average.total:
        needs["average"] = average
    if copies := _copies_of_base(config, module, data):
        needs["copies of the base"] = Need(weights=copies)
    return needs, disk


def module_on_meta(config: RunConfig) -> Any:
    """The module of a config without data, and not compiled: the graph is that of the network itself."""
    node = with_params(config.model, {"compile": None}) if takes(config.model, "compile") else config.model
    with torch.device("meta"):
        return instantiate(node)


def _share(need: Need, processes: int) -> Need:
    """What one process has of a network that FSDP splits; the block that computes is whole for that time."""
    shares = {name: -(-getattr(need, name) // processes) for name in ("weights", "gradients", "states")}
    return Need(**shares, activations=need.activations)


def _average(config: RunConfig, module: LatentDiffusion, needs: Mapping[str, Need]) -> Need:
    """A float32 average of what learns, and a copy of it in the weights' place while the validation runs.

    The copy is made where the average is of another dtype or on another device; no gradients are held then.
    """
    free_then = sum(need.gradients + need.activations for need in needs.values())
    if averages_weights(module.optimizer):  # the weights that are trained, beside their average
        return Need(activations=max(0, _size(_learning(module)) - free_then))
    if config.ema_decay is None:
        return Need()
    learning, apart = _learning(module), config.ema_device == "cpu"
    copied = _size(p for p in learning if apart or p.dtype != torch.float32)
    return Need(weights=0 if apart else _float_size(learning), activations=max(0, copied - free_then))


def _copies_of_base(config: RunConfig, module: LatentDiffusion, data: DreamBoothDataModule) -> int:
    """Bytes of what is kept of the untouched base: whole networks, or the weights that learn."""
    networks = [module.networks[name] for name in ("unet", "text_encoder")]
    whole = sum(_size(network.parameters()) for network in networks)
    copies = whole * data.online_priors
    if module.objective.needs_reference and module.lora is None:
        layers = [layer for network in networks for layer in cast_by_autocast(network)]
        halved = _size(p for layer in layers for p in layer.parameters() if p.dtype == torch.float32) // 2
        copies += whole - (halved if config.trainer.precision in AUTOCAST else 0)
    guided = [config.samples.guidance_base]
    guided += [param_of(node, "guidance_base") for node in evaluation_nodes(config).values()]
    if any(guided) and module.lora is None:  # one copy for samples and metrics
        copies += whole
    pulled = module.objective.l2_sp_weight > 0 and module.lora is None  # the norm of a LoRA needs no copy
    return copies + (_size(_learning(module)) if pulled else 0)


def encoding(config: RunConfig) -> int:
    """Bytes on the device while views are encoded, before training: the networks, and the encoder's work."""
    module = module_on_meta(config)
    weights = _size(module.state_dict().values())
    encoder, size = module.networks["vae"].encoder, param_of(config.data, "size")
    with FakeTensorMode():
        stand_ins = _without_data(encoder)
        images = torch.zeros(views_at_once(size), 3, size, size)
        with torch.no_grad(), PeakBytes() as made:
            functional_call(encoder, stand_ins, images)
        return weights + images.nbytes + made.peak


def report(needs: Mapping[str, Need], disk: Mapping[str, int], *, encoding: int = 0) -> str:
    """All as lines in MiB. encoding: of the views before training; 0 where that is part of each step."""
    columns = [field.name for field in fields(Need)] + ["total"]
    rows = {name: [getattr(need, column) for column in columns] for name, need in needs.items()}
    rows["sum"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    lines = ["device memory, MiB".ljust(20) + "".join(f"{column:>13}" for column in columns)]
    lines += [name.ljust(20) + "".join(f"{n / MIB:13,.1f}" for n in row) for name, row in rows.items()]
    if encoding:
        lines.append("before training, while views are encoded: ".ljust(20) + f"{encoding / MIB:,.1f}")
    lines += ["disk, MiB"] + [f"{name:<20}{n / MIB:13,.1f}" for name, n in disk.items()]
    return "\n".join(lines)


def _activations(module: LatentDiffusion, data: DreamBoothDataModule, *, precision: str) -> dict[str, int]:
    """Bytes that a micro-batch's backward pass needs, the stage computed again included."""
    unet, text = module.networks["unet"], module.networks["text_encoder"]
    subject, priors = data.batch_size, data.prior_batch_size
    height, width = (side // module.networks["vae"].factor for side in data.buckets_in_use.largest)
    mixed = torch.autocast("cpu", dtype=torch.bfloat16) if "mixed" in precision else nullcontext()
    found, lora_weights = {}, {}
    if module.lora is not None:
        module.lora._apply(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype))
        lora_weights = dict(module.lora.named_parameters()) | dict(module.lora.named_buffers())
    with mixed:
        weights = _without_data(text)
        prompts = torch.zeros(_captions_at_once(data), *text.token_shape, dtype=torch.int64)
        with _saving(text, weights | lora_weights, {}) as saved:
            encoded = functional_call(text, weights, prompts)
        found["text_encoder"] = sum(saved)
        timesteps = torch.zeros(subject + priors, dtype=torch.int64)
        rows = [0] * subject + [1] * priors
        context = encoded if isinstance(encoded, Tensor) else encoded[0]
        context = context.detach().requires_grad_(context.requires_grad)
        vector = None
        if unet.adm_in_channels is not None:
            vector = torch.zeros(len(rows), unet.adm_in_channels).requires_grad_(context.requires_grad)
        x = torch.zeros(subject + priors, module.networks["vae"].embed_dim, height, width)
        stages = [*unet.input_blocks, unet.middle_block, *unet.output_blocks]
        weights, dtype = _without_data(unet), unet.dtype
        told = Conditioning(context.index_select(0, torch.tensor(rows)), vector).to(dtype)
        with _saving(unet, weights | lora_weights, {stage: height for stage in stages}) as saved:
            functional_call(unet, weights, (x.to(dtype), timesteps, told))
        found["unet"] = sum(saved)
    return found


def _captions_at_once(data: DreamBoothDataModule) -> int:
    """The most different captions that a micro-batch may have; those that are equal are encoded once."""
    subject, priors = data.batch_size, data.prior_batch_size
    if not data.images.options.has_own_captions:
        subject, priors = min(subject, len(data.concepts)), min(priors, len(data.classes or data.concepts))
    dropped = data.caption_dropout > 0 or (priors > 0 and data.prior_caption_dropout > 0)
    return min(subject + priors + dropped, data.batch_size + data.prior_batch_size)


def _without_data(network: nn.Module) -> dict[str, Tensor]:
    """Stand-ins for parameters and buffers in the current fake mode, of the same layout and freedom."""
    own = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {
        name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).requires_grad_(t.requires_grad)
        for name, t in own.items()
    }


@contextmanager
def _saving(
    network: nn.Module, weights: Mapping[str, Tensor], heights: Mapping[nn.Module, int]
) -> Iterator[list[int]]:
    """Yields a list that afterwards holds [bytes kept, most bytes of a stage that is computed again].

    weights: what does not count. heights: stages, each with the height of the network's input.
    A stage that is computed again keeps its input.
    """
    ignored = {_key(tensor) for tensor in weights.values()}
    kept: dict[int, Tensor] = {}
    inside: dict[nn.Module, dict[int, Tensor]] = {}
    scope, result = [kept], []

    def keep(tensor: Tensor) -> Tensor:
        if _key(tensor) not in ignored:
            scope[-1][_key(tensor)] = tensor
        return tensor

    def enter(stage: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if chosen and (chosen is True or not heights or heights[stage] // inputs[0].shape[2] in chosen):
            keep(inputs[0])
            scope.append(inside.setdefault(stage, {}))

    def leave(stage: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        if stage in inside:
            scope.pop()

    chosen, network.use_checkpoint = network.use_checkpoint or False, False
    stages = heights or network.layers
    hooks = [stage.register_forward_pre_hook(enter) for stage in stages]
    hooks += [stage.register_forward_hook(leave) for stage in stages]
    try:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            yield result
        result += [_storage(kept.values()), max((_storage(s.values()) for s in inside.values()), default=0)]
    finally:
        network.use_checkpoint = chosen
        for hook in hooks:
            hook.remove()


def _disk(config: RunConfig, module: LatentDiffusion, data: DreamBoothDataModule) -> dict[str, int]:
    """Bytes of the run's files, at most."""
    drawn = data.num_priors * len(data.generated_classes)
    count = checkpoints_to_come(config, evaluate_every=config.online_eval.every_steps)
    return {
        f"checkpoints, at most {count}": count
        * checkpoint_bytes(module, averaged=config.ema_decay is not None),
        "model file": WIDTHS[config.export.dtype] * sum(p.numel() for p in module.parameters()),
        "prior images, at most": drawn * 3 * data.size**2,
    }


def _learning(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _float_size(tensors: Iterable[Tensor]) -> int:
    return sum(4 * tensor.numel() for tensor in tensors)


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _storage(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _key(tensor: Tensor) -> int:
    """Names the memory that a tensor lies in."""
    return tensor.untyped_storage()._cdata
