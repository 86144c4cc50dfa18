"""A second device that is none: it computes on the CPU, and refuses tensors of two devices as a GPU does.

Importing it registers the device with torch for the whole process, so tests do that in one of their own.
Autocast does nothing on it.
"""

import sys
import threading
import traceback
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, fallthrough_kernel
from torch.utils import backend_registration
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

aten = torch.ops.aten
COPIES = (aten.copy_.default, aten._foreach_copy_.default, aten._to_copy.default)
TO_PYTHON = (aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default)
BY_VALUES = (  # whose shape the values decide, which the host has to know
    aten.nonzero.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
)
PUTS = (aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


backend_registration._setup_privateuseone_for_python_backend("elsewhere", backend_module=Backend())
DEVICE = torch.device("elsewhere", 0)

in_steps: Counter[str] = Counter()  # place in ldm where the host met the device in a step -> how often


class Elsewhere(Tensor):
    """A tensor of the device, which holds one of the CPU."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> "Elsewhere":
        about = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        there = Tensor._make_wrapper_subclass(cls, here.shape, device=DEVICE, **about)
        there.here = here
        return there

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(op, *args, **kwargs or {})

    def untyped_storage(self) -> Any:
        return self.here.untyped_storage()

    def data_ptr(self) -> int:
        return self.here.data_ptr()

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.here.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict) -> "Elsewhere":
        copied = Elsewhere(self.here.detach().clone()).requires_grad_(self.requires_grad)
        if hasattr(self, "_is_param"):
            copied._is_param = self._is_param
        memo[id(self)] = copied
        return copied


def host(value: Any) -> Any:
    """What the CPU computes with in place of a value of the device."""
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.here if isinstance(value, Elsewhere) else value


def computed(op: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation, on the CPU. Raises RuntimeError for tensors, or a generator, of two devices."""
    flat, spec = tree_flatten((args, kwargs))
    stays = _stays(op, args, kwargs)
    if op not in COPIES:
        _require_one_device(op, flat if not stays else _placed(op, args, flat), kwargs, stays=stays)
    here = [host(x) for x in flat]
    a, k = tree_unflatten(here, spec)
    k.pop("pin_memory", None)
    with torch.inference_mode(False), torch.no_grad():
        found = op(*a, **k)
        if _meets(op, args, kwargs, flat, stays=stays):
            _count()
        if not stays:
            return found
        same = {id(h): x for h, x in zip(here, flat, strict=True) if isinstance(x, Elsewhere)}
        return tree_map_only(Tensor, lambda t: same[id(t)] if id(t) in same else Elsewhere(t), found)


def _stays(op: Any, args: tuple, kwargs: dict) -> bool:
    """Whether what an operation gives is on the device."""
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"]).type == DEVICE.type
    decides = args[:1] if op in (*COPIES, *PUTS, aten.index.Tensor) else (args, kwargs)
    return op not in TO_PYTHON and any(isinstance(x, Elsewhere) for x in tree_flatten(decides)[0])


def _meets(op: Any, args: tuple, kwargs: dict, flat: list, *, stays: bool) -> bool:
    """Whether the host waits for the device, or copies to it so that it might."""
    there = any(isinstance(x, Elsewhere) for x in flat)
    if not stays:
        return there
    if op in (aten.copy_.default, aten._to_copy.default):
        source, *rest = args[1:] if op is aten.copy_.default else args
        return not isinstance(source, Elsewhere) and not any(rest) and not kwargs.get("non_blocking")
    if op in (*PUTS, aten.index.Tensor):
        indices = [x for x in tree_flatten(args[1])[0] if isinstance(x, Tensor)]
        return any(not isinstance(x, Elsewhere) or x.dtype == torch.bool for x in indices)
    return op in BY_VALUES and there


def _placed(op: Any, args: tuple, flat: list) -> list:
    """The arguments whose place matters: indices may be on the CPU."""
    if op in PUTS:
        return [args[0], args[2]]
    return [args[0]] if op is aten.index.Tensor else flat


def _require_one_device(op: Any, values: list, kwargs: dict, *, stays: bool) -> None:
    for x in values:
        if isinstance(x, torch.Generator) and stays:
            raise RuntimeError(f"{op}: the generator is on the {x.device}")
        is_placed = isinstance(x, Tensor) and x.dim() > 0 and kwargs.get("device") is None
        if is_placed and isinstance(x, Elsewhere) != stays and op not in TO_PYTHON:
            raise RuntimeError(f"{op}: all tensors are to be on one device, and one is on the {x.device}")


def _count() -> None:
    if _in_step():
        ours = [frame for frame in traceback.extract_stack() if "/ldm/" in frame.filename]
        place = f"{ours[-1].filename.rpartition('/ldm/')[2]}: {ours[-1].name}" if ours else "backward pass"
        in_steps[place] += 1


def _in_step() -> bool:
    """Whether the main thread is in a training step; a backward pass and others have threads of their own."""
    frame = sys._current_frames()[threading.main_thread().ident]
    while frame is not None:
        code = frame.f_code
        if code.co_name == "advance" and code.co_filename.endswith("training_epoch_loop.py"):
            return True
        frame = frame.f_back
    return False


def _empty(size: Any, dtype: Any = None, memory_format: Any = None, **placement: Any) -> Elsewhere:
    return Elsewhere(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **placement: Any) -> Elsewhere:
    return Elsewhere(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    if not non_blocking:
        _count()
    host(target).copy_(host(source))
    return target


_aten = Library("aten", "IMPL")
_aten.impl("empty.memory_format", _empty, "PrivateUse1")
_aten.impl("empty_strided", _empty_strided, "PrivateUse1")
_aten.impl("_copy_from", _copy_from, "PrivateUse1")
_autocast = Library("_", "IMPL", "AutocastPrivateUse1")
_autocast.fallback(fallthrough_kernel)
