"""AdamW whose states, or also weights, are bfloat16: many tensors at a time, with stochastic rounding."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ldm import randomness
from ldm.annotations import Decay, NonNegativeFloat, PositiveFloat, Seed
from ldm.optim.strides import same_order

Group = dict[str, Any]  # "params", "lr", "name"
MOMENTS = ("exp_avg", "exp_avg_sq")
PIECE = 2**22  # elements of a tensor at most that share a random place in the table of rounding
ROOM = {"cpu": 2**18}  # elements that are updated at a time, 1 MiB in float32 on a CPU; elsewhere `PIECE`
OFFSETS = 2**20  # places at least at which a piece may begin to read the table of random numbers
UPPER = 1 if sys.byteorder == "little" else 0  # of the two halves of a float32


class Piece(NamedTuple):
    """A part of one parameter, in the order of its memory."""

    parameter: Tensor
    start: int
    stop: int
    number: int  # among all pieces of the optimizer

    def of(self, tensor: Tensor) -> Tensor:
        """This part of a tensor with the parameter's strides -> [stop - start], a view."""
        return tensor.as_strided((tensor.numel(),), (1,))[self.start : self.stop]

    @property
    def gradient(self) -> Tensor:
        """Of this part -> [stop - start]."""
        gradient, parameter = self.parameter.grad, self.parameter
        return self.of(
            gradient if same_order(gradient, parameter) else torch.empty_like(parameter).copy_(gradient)
        )


class AdamWBF16(Optimizer):
    """AdamW whose weights and moments are bfloat16: 6 bytes a weight, and 2 more for its gradient.

    Each update is computed in float32 and written with stochastic rounding (Gupta et al. 2015). Rounding to
    the nearest would lose every update below 1/512 of a weight: at learning rates of fine-tuning, nearly all.

    Tensors are updated in buckets, so that small ones cost no kernel launches of their own; those of a CPU
    stay in its cache. A weight is rounded in the same way on every device and in every bucket.

    `grad_scale`, where it is set, divides the gradients, as in torch's fused optimizers.

    params: parameter groups, each with its "lr".
    betas, eps, weight_decay: as of AdamW.
    seed: of the rounding.
    """

    weights_dtype: torch.dtype | None = torch.bfloat16  # of the networks that it trains; None: as they are
    moments_dtype: torch.dtype | None = None  # None: the weight's

    def __init__(
        self,
        params: Iterable[Group],
        *,
        betas: tuple[Decay, Decay] = (0.9, 0.999),
        eps: PositiveFloat = 1e-8,
        weight_decay: NonNegativeFloat = 0.01,
        seed: Seed = 0,
    ):
        super().__init__(params, {"betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self.grad_scale: Tensor | None = None
        everything = [p for group in self.param_groups for p in group["params"]]
        starts = [(p, start) for p in everything for start in range(0, p.numel(), PIECE)]
        self._pieces: dict[Tensor, list[Piece]] = {parameter: [] for parameter in everything}
        for number, (p, start) in enumerate(starts):
            self._pieces[p].append(Piece(p, start, min(start + PIECE, p.numel()), number))
        longest = max(min(p.numel(), PIECE) for p in everything)
        self._rounding = Rounding(seed, pieces=len(starts), longest=longest)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            alike: dict[tuple[int, torch.dtype], list[Piece]] = {}  # same step, same dtype
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self._state_of(parameter)
                state["step"] += 1
                alike.setdefault((state["step"], parameter.dtype), []).extend(self._pieces[parameter])
            for (t, _), pieces in alike.items():
                room = ROOM.get(pieces[0].parameter.device.type, PIECE)
                for bucket in buckets(pieces, room=room):
                    self._update(bucket, group, t)
        return loss

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        """Of a parameter, made at its first step."""
        state, dtype = self.state[parameter], self.moments_dtype or parameter.dtype
        if not state:
            state["step"] = 0
            state |= {name: torch.zeros_like(parameter, dtype=dtype) for name in MOMENTS}
        return state

    def _update(self, bucket: Sequence[Piece], group: Group, t: int) -> None:
        """Loshchilov and Hutter 2019, algorithm 2, of pieces of one dtype at step t, by torch's kernel."""
        kept = {name: [piece.of(self.state[piece.parameter][name]) for piece in bucket] for name in MOMENTS}
        kept["weight"] = [piece.of(piece.parameter) for piece in bucket]
        wide = {purpose: _float32(parts) for purpose, parts in kept.items()}
        device = bucket[0].parameter.device
        torch._fused_adamw_(
            wide["weight"],
            _float32([piece.gradient for piece in bucket]),
            wide["exp_avg"],
            wide["exp_avg_sq"],
            [],
            [torch.full((), float(t), device=device)] * len(bucket),
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=self.grad_scale,
        )
        for purpose, parts in kept.items():
            exact = wide[purpose]
            if parts[0].dtype == torch.bfloat16:
                draws = self._rounding.draws(purpose, t, bucket, device)
                joined = exact[0].as_strided(draws.shape, (1,))
                exact = stochastically_rounded_(joined, draws).split([len(part) for part in parts])
            if exact is not parts:
                torch._foreach_copy_(parts, exact)


class AdamWBF16Moments(AdamWBF16):
    """AdamW whose moments alone are bfloat16: 8 bytes a weight and 4 for its gradient, in place of 16.

    Weights keep their dtype, float32 as a rule, and so lose no update. The moments are rounded
    stochastically: to the nearest, the second would stand still at beta2 of 0.999.
    """

    weights_dtype = None
    moments_dtype = torch.bfloat16


class Rounding:
    """Random numbers for stochastic rounding: from one table, read from another place for every use.

    The numbers of a piece are a function of (seed, purpose, step, the piece's number). All come from
    generators on the CPU, so every device has the same, for one read of memory.
    """

    def __init__(self, seed: int, *, pieces: int, longest: int):
        self.seed = seed
        self.pieces = pieces
        self.offsets = max(longest, OFFSETS)
        self.length = self.offsets + longest
        self._tables: dict[torch.device, Tensor] = {}
        self._places: dict[tuple[str, int], tuple[list[int], int]] = {}  # (purpose, step) -> offsets, mask

    def draws(self, purpose: str, t: int, bucket: Sequence[Piece], device: torch.device) -> Tensor:
        """Uniform integers in [0, 2^16) -> [elements of the bucket] int32."""
        table = self._table(device)
        offsets, mask = self._of_step(purpose, t)
        places = [(offsets[p.number] + p.start % PIECE, p.stop - p.start) for p in bucket]
        parts = [table.narrow(0, start, length) for start, length in places]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)) ^ mask

    def _table(self, device: torch.device) -> Tensor:
        if device not in self._tables:
            draws = randomness.generator(self.seed, 0, "rounding/table")
            table = torch.randint(1 << 16, (self.length,), generator=draws, dtype=torch.int32)
            self._tables[device] = table.to(device)
        return self._tables[device]

    def _of_step(self, purpose: str, t: int) -> tuple[list[int], int]:
        """Where each piece begins to read, and bits that are flipped in all that is read."""
        if (purpose, t) not in self._places:
            self._places = {key: kept for key, kept in self._places.items() if key[0] != purpose}
            draws = randomness.generator(self.seed, t, f"rounding/{purpose}")
            offsets = torch.randint(self.offsets, (self.pieces,), generator=draws).tolist()
            self._places[purpose, t] = offsets, int(torch.randint(1 << 16, (), generator=draws))
        return self._places[purpose, t]


def buckets(pieces: Iterable[Piece], *, room: int) -> Iterator[list[Piece]]:
    """Pieces in their order, as many together as have `room` elements at most; larger ones are divided."""
    bucket, size = [], 0
    for piece in (part for whole in pieces for part in divided(whole, room)):
        length = piece.stop - piece.start
        if bucket and size + length > room:
            yield bucket
            bucket, size = [], 0
        bucket.append(piece)
        size += length
    if bucket:
        yield bucket


def divided(piece: Piece, room: int) -> Iterator[Piece]:
    """Parts of `room` elements at most."""
    for start in range(piece.start, piece.stop, room):
        yield piece._replace(start=start, stop=min(start + room, piece.stop))


def stochastically_rounded_(exact: Tensor, draws: Tensor) -> Tensor:
    """Float32 values, each rounded to one of two neighbours in bfloat16, right on average -> [n] bfloat16.

    exact: [n], which is overwritten. draws: [n] int32, uniform in [0, 2^16). bfloat16 is the upper half of a
    float32: what is added to the lower half carries into it with the probability that the lower half says.
    """
    bits = exact.view(torch.int32).add_(draws)
    return bits.view(torch.bfloat16)[UPPER::2]


def _float32(parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """Parts [n_i], themselves if they are float32, else copies one after the other in one piece of memory."""
    if parts[0].dtype == torch.float32:
        return parts
    joined = torch.cat(parts) if len(parts) > 1 else parts[0]
    return joined.float().split([len(part) for part in parts])
