"""A training step as CUDA graphs: all kernels of a pass are launched at once, not one by one by the host."""

from collections.abc import Callable, Iterable, Sequence

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from ldm.cuda_graph import Recorder, capture
from ldm.engine.device import device_of
from ldm.errors import UserError
from ldm.models.adapter import Adapter
from ldm.models.conditioning import Conditioning
from ldm.optim.optimizer_nodes import steps_in_backward
from ldm.optim.strides import same_order
from ldm.schema import TrainerOptions
from ldm.training.masks import masked_inputs
from ldm.training.techniques import Reference

WARM_UP = 3  # eager passes before a capture: libraries choose their kernels and workspaces in them


class GraphedLoss:
    """A differentiable function of tensors, whose forward and backward pass are one CUDA graph each.

    A step of SD 1.5 launches some 6000 kernels; a GPU runs them faster than a host can launch them. The
    kernels are those of the eager pass, so the values are too. The graphs keep the memory of activations and
    gradients between the steps, those of each shape of the inputs their own, and are captured anew for other
    inputs, or weights at another address. Gradients are not handed to autograd's hooks: one process, no fused
    backward pass.

    function: keyword tensors -> losses [B]. It must not wait for the device, nor draw random numbers.
    learning: the parameters that get a gradient. fixed: all others that the function reads.
    recorded: turns work into what repeats it, by default `capture`.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        *,
        learning: Iterable[nn.Parameter],
        fixed: Iterable[nn.Parameter] = (),
        recorded: Recorder = capture,
    ):
        self.function = function
        self.learning = list(learning)
        self.fixed = list(fixed)
        self.recorded = recorded
        self._passes: dict[tuple, _Passes] = {}  # by the inputs' shapes
        self._kind: tuple | None = None

    def __call__(self, **inputs: Tensor) -> Tensor:
        """-> losses [B], as of `function`; inputs need no gradient."""
        named = sorted(inputs.items())
        kind = (
            tuple((name, x.dtype) for name, x in named),
            tuple(p.data_ptr() for p in (*self.learning, *self.fixed)),
        )
        if kind != self._kind:
            self._passes.clear()  # their memory first
            self._kind = kind
        shapes = tuple(x.shape for _, x in named)
        if shapes not in self._passes:
            self._passes[shapes] = _Passes(self.function, self.learning, inputs, self.recorded)
        passes = self._passes[shapes]
        passes.keep_gradients()
        passes.fill(inputs)
        passes.run_forward()
        anchor = torch.ones((), requires_grad=True)
        return _Replay.apply(anchor, passes)


def uses_cuda_graph(module: pl.LightningModule, trainer: pl.Trainer | None) -> bool:
    """Whether a run captures its step: as `module.cuda_graph` says, or where it can."""
    if module.cuda_graph is not None:
        return module.cuda_graph
    processes = 1 if trainer is None else trainer.world_size
    buckets = getattr(getattr(trainer, "datamodule", None), "buckets_in_use", None)
    if buckets is not None and len(buckets.shapes) > 1:  # each would keep the memory of its own graphs
        return False
    return module.device.type == "cuda" and hindrance(module, processes=processes) is None


def hindrance(module: pl.LightningModule, *, processes: int = 1) -> str | None:
    """Why a module's step cannot be captured; None if it can."""
    if isinstance(module.lora, Adapter) and module.lora.needs_host:
        return f"Each step of this adapter ({module.lora.kind}) waits for the device, a CUDA graph cannot"
    if steps_in_backward(module.optimizer):
        return "A CUDA graph hands no gradients to a fused backward pass"
    if processes > 1:
        return "A CUDA graph hands no gradients to other processes"
    if module.training_graph is not None and module.training_graph.has_cuda_graphs:
        return "This mode of torch.compile has CUDA graphs of its own, which cannot be captured in another"
    return None


def check_cuda_graph(
    module: pl.LightningModule, trainer: TrainerOptions | pl.Trainer, *, processes: int = 1
) -> None:
    """Raises UserError if `module.cuda_graph` asks for graphs that cannot be."""
    what = hindrance(module, processes=processes)
    if isinstance(trainer, TrainerOptions) and device_of(trainer).type != "cuda":
        what = "CUDA graphs need an NVIDIA GPU, and this run has none"
    if module.cuda_graph and what is not None:
        raise UserError(what, where="model.params.cuda_graph", remedy="Set it to false.")


def graphed_loss(
    module: pl.LightningModule, function: Callable[..., Tensor], others: Iterable[nn.Parameter] = ()
) -> GraphedLoss:
    """A function of a module's batches by graphs. others: parameters that it reads besides the module's.

    It has nothing to do with the VAE, which is moved between devices during a run.
    """
    learning = [p for part in module.trainable_modules.values() for p in part.parameters() if p.requires_grad]
    read = (p for name in ("unet", "text_encoder") for p in module.networks[name].parameters())
    fixed = [p for p in (*read, *others) if not p.requires_grad]
    return GraphedLoss(function, learning=learning, fixed=fixed)


class GraphedStep:
    """`LatentDiffusion.losses` by graphs, from a batch."""

    def __init__(self, module: pl.LightningModule, reference: Reference | None):
        self.module = module
        self.reference = reference
        base = () if reference is None else reference.unet.parameters()
        self.graphed = graphed_loss(module, self._losses, base)

    def __call__(self, batch: dict) -> Tensor:
        """A batch as `on_before_batch_transfer` prepares it -> losses [B]."""
        module, sizes = self.module, batch.get("sizes")
        stats = batch["latent_stats"] if "latent_stats" in batch else module.encode_images(batch["image"])
        tensors = {"latent_stats": stats, "randomness": batch["randomness"], **masked_inputs(batch)}
        if module.trainable.text_learns(module.networks) and module.trainable.text_learns_at(
            module.global_step
        ):
            tensors["ids"] = module.conditioner.ids_of(batch["caption"])
            tensors |= {} if sizes is None else {"sizes": sizes}
            if module.cond_stage_model.unconditional is None:  # an empty prompt is zeros
                tensors["given"] = torch.tensor([caption != "" for caption in batch["caption"]])
        else:
            tensors |= module.condition(batch["caption"], sizes).by_name("")
        if self.reference is not None and batch["reference_items"]:
            tensors |= {name: batch[name] for name in ("reference_rows", "compared") if name in batch}
            tensors |= self.reference.condition_of(batch).by_name("reference_")
        return self.graphed(**tensors)

    def _losses(self, **tensors: Tensor) -> Tensor:
        module = self.module
        if "ids" in tensors:
            encoding = module.cond_stage_model.encode(tensors["ids"])
            if "given" in tensors:
                encoding = encoding.where(tensors["given"])
            conditioning = module.conditioner.conditioning(encoding, None, tensors.get("sizes"))
        else:
            conditioning = Conditioning(tensors["context"], tensors.get("vector"))
        batch = {"latent_stats": tensors["latent_stats"], "randomness": tensors["randomness"]}
        batch |= masked_inputs(tensors)
        batch["reference_rows"] = tensors.get("reference_rows", torch.empty(0))
        if "compared" in tensors:
            batch["compared"] = tensors["compared"]
        if "reference_context" in tensors:
            context, vector = tensors["reference_context"], tensors.get("reference_vector")
            batch["reference_conditioning"] = Conditioning(context, vector)
        return module.losses(batch, conditioning)


class _Passes:
    """The two graphs for inputs of one shape."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        learning: Sequence[nn.Parameter],
        inputs: dict[str, Tensor],
        recorded: Recorder,
    ):
        device = learning[0].device
        self.function = function
        self.learning = learning
        self.inputs = {name: torch.empty_like(x, device=device) for name, x in inputs.items()}
        self.fill(inputs)
        self.output = torch.empty(0)
        self.output_gradient = torch.empty(0)
        self.gradients: list[Tensor | None] = []
        self._warm_up(device)
        self.run_forward, pool = recorded(self.forward, None)
        self.output_gradient = torch.zeros_like(self.output)
        self.run_backward, _ = recorded(self.backward, pool)
        self.output = self.output.detach()  # autograd's own graph has served

    def fill(self, inputs: dict[str, Tensor]) -> None:
        for name, x in inputs.items():
            self.inputs[name].copy_(x, non_blocking=True)

    def forward(self) -> None:
        self.output = self.function(**self.inputs)

    def backward(self) -> None:
        """Gradients in the strides of their weights, as autograd accumulates them and kernels expect them."""
        with torch.autocast(self.output.device.type, enabled=False):  # of the forward pass alone
            gradients = torch.autograd.grad(
                self.output, self.learning, self.output_gradient, allow_unused=True
            )
        self.gradients = [
            g if g is None or same_order(g, p) else torch.empty_like(p, dtype=g.dtype).copy_(g)
            for p, g in zip(self.learning, gradients, strict=True)
        ]

    def keep_gradients(self) -> None:
        """Copies what weights have of an earlier micro-batch: both passes write to that memory.

        The graphs share a pool, and gradients lie where the backward pass has freed activations.
        """
        for p, g in zip(self.learning, self.gradients, strict=True):
            if g is not None and p.grad is g:
                p.grad = g.clone()

    def accumulate(self, output_gradient: Tensor) -> None:
        """Runs the backward pass and adds its gradients to those of the weights."""
        self.output_gradient.copy_(output_gradient)
        self.run_backward()
        sums, terms = [], []
        for p, g in zip(self.learning, self.gradients, strict=True):
            if g is not None and p.grad is None:
                p.grad = g
            elif g is not None:
                sums.append(p.grad)
                terms.append(g)
        if sums:
            torch._foreach_add_(sums, terms)

    def _warm_up(self, device: torch.device) -> None:
        """Some passes on a stream of their own, as captures need them."""
        if device.type != "cuda":
            return
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.forward()
                self.output_gradient = torch.zeros_like(self.output)
                self.backward()
        torch.cuda.current_stream(device).wait_stream(stream)
        self.gradients = []
        self.output = torch.empty(0)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, anchor: Tensor, passes: _Passes) -> Tensor:
        """anchor: a scalar that asks for a gradient, so that the backward pass is run."""
        ctx.passes = passes
        return passes.output.detach().clone()  # the graph's own is overwritten by the next step

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, output_gradient: Tensor) -> tuple[None, None]:
        ctx.passes.accumulate(output_gradient)
        return None, None
