"""Group normalization in channels-last, with SiLU, as Triton kernels.

PyTorch's kernel on a GPU knows only NCHW: between convolutions in channels-last its input and its output
are copied, and under autocast it computes in float32, SiLU with it. Here a tensor is read as it lies, as
[N, S, C] with S = H W, in its own dtype, twice, and written once; statistics are float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

MANY = 128 * 128  # cells: above, tiles are larger, so that a group's programs stay few
COLUMNS = 64  # channels of it
jit = triton.jit(do_not_specialize=["cells", "width", "chunks"])  # one translation for all levels of a UNet


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, *, groups: int, eps: float, silu: bool) -> Tensor:
    """Group normalization (Wu and He 2018), then SiLU if asked for. [N, C, H, W] -> as x, channels-last."""
    return _GroupNorm.apply(x, weight, bias, groups, eps, silu)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        n, c, h, w = x.shape
        cells = h * w
        rows = _rows(cells)
        chunks = triton.cdiv(cells, rows)
        partial = x.new_empty(2, n, chunks, c, dtype=torch.float32)
        moments = x.new_empty(2, n, groups, dtype=torch.float32)
        y = torch.empty_like(x)
        grid = (n, chunks, triton.cdiv(c, COLUMNS))
        tile = {"ROWS": rows, "COLUMNS": COLUMNS}
        folded = {"CHUNKS": triton.next_power_of_2(chunks), "WIDTH": triton.next_power_of_2(c // groups)}
        _chunk_moments[grid](x, partial[0], partial[1], cells, c, chunks, **tile)
        _group_moments[(n, groups)](
            partial[0],
            partial[1],
            moments[0],
            moments[1],
            cells,
            c,
            c // groups,
            chunks,
            eps,
            ROWS=rows,
            **folded,
        )
        _normalize[grid](x, y, moments[0], moments[1], weight, bias, cells, c, c // groups, SILU=silu, **tile)
        ctx.save_for_backward(x, weight, bias, moments)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, moments = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        n, c, h, w = x.shape
        groups, cells = moments.shape[2], h * w
        rows = _rows(cells)
        chunks = triton.cdiv(cells, rows)
        partial = x.new_empty(2, n, chunks, c, dtype=torch.float32)
        sums = x.new_empty(2, n, groups, dtype=torch.float32)
        grid = (n, chunks, triton.cdiv(c, COLUMNS))
        tile = {"ROWS": rows, "COLUMNS": COLUMNS, "SILU": ctx.silu}
        folded = {"CHUNKS": triton.next_power_of_2(chunks), "WIDTH": triton.next_power_of_2(c // groups)}
        normed = (moments[0], moments[1], weight, bias)
        _chunk_gradients[grid](x, dy, *normed, partial[0], partial[1], cells, c, c // groups, chunks, **tile)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            _group_gradients[(n, groups)](
                partial[0], partial[1], weight, sums[0], sums[1], cells, c, c // groups, chunks, **folded
            )
            _input_gradient[grid](x, dy, dx, *normed, sums[0], sums[1], cells, c, c // groups, **tile)
        dweight = partial[1].sum((0, 1)).to(weight.dtype) if ctx.needs_input_grad[1] else None
        dbias = partial[0].sum((0, 1)).to(bias.dtype) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias, None, None, None


def _rows(cells: int) -> int:
    """Cells of a program's tile."""
    return 64 if cells <= MANY else 256


@triton.jit
def _tile(cells, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """-> the program's offsets in x [N, S, C], its mask, its channels, and their mask."""
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < channels
    start = tl.program_id(0).to(tl.int64) * cells * channels
    return (
        start + rows[:, None] * channels + columns[None, :],
        (rows < cells)[:, None] & inside[None, :],
        columns,
        inside,
    )


@jit
def _chunk_moments(x, means, squares, cells, channels, chunks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Mean of each channel over a chunk of cells, and sum of the squared distances to it."""
    at, mask, columns, inside = _tile(cells, channels, ROWS, COLUMNS)
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    count = tl.minimum(ROWS, cells - tl.program_id(1) * ROWS)
    mean = tl.sum(value, 0) / count
    distance = tl.where(mask, value - mean[None, :], 0.0)
    to = (tl.program_id(0) * chunks + tl.program_id(1)) * channels + columns
    tl.store(means + to, mean, mask=inside)
    tl.store(squares + to, tl.sum(distance * distance, 0), mask=inside)


@jit
def _group_moments(
    means, squares, mean, rstd, cells, channels, width, chunks, eps,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / standard deviation of a group, from those of its chunks (Chan et al. 1983)."""
    n, group = tl.program_id(0), tl.program_id(1)
    chunk, column = tl.arange(0, CHUNKS), tl.arange(0, WIDTH)
    mask = (chunk < chunks)[:, None] & (column < width)[None, :]
    at = (n * chunks + chunk[:, None]) * channels + group * width + column[None, :]
    part = tl.load(means + at, mask=mask, other=0.0)
    count = tl.where(mask, tl.minimum(ROWS, cells - chunk * ROWS)[:, None].to(tl.float32), 0.0)
    total = cells * width
    middle = tl.sum(count * part) / total
    distance = tl.where(mask, part - middle, 0.0)
    square = tl.sum(tl.load(squares + at, mask=mask, other=0.0) + count * distance * distance)
    to = n * tl.num_programs(1) + group
    tl.store(mean + to, middle)
    tl.store(rstd + to, 1.0 / tl.sqrt(square / total + eps))


@triton.jit
def _normed(x, at, mask, mean, rstd, weight, bias, channels, width, columns, inside):
    """-> (x - mean) / std, that times weight plus bias, the weights, and 1 / std, all in float32."""
    group = tl.program_id(0) * (channels // width) + columns // width
    scale = tl.load(rstd + group, mask=inside, other=0.0)
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    normed = (value - tl.load(mean + group, mask=inside, other=0.0)[None, :]) * scale[None, :]
    weights = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    biases = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    return normed, normed * weights[None, :] + biases[None, :], weights, scale


@jit
def _normalize(
    x, y, mean, rstd, weight, bias, cells, channels, width,
    SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    at, mask, columns, inside = _tile(cells, channels, ROWS, COLUMNS)
    _, value, _, _ = _normed(x, at, mask, mean, rstd, weight, bias, channels, width, columns, inside)
    if SILU:
        value = value * tl.sigmoid(value)
    tl.store(y + at, value, mask=mask)


@triton.jit
def _before_silu(dy, at, mask, value, SILU: tl.constexpr):
    """The gradient of what SiLU is given."""
    gradient = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        gate = tl.sigmoid(value)
        gradient = gradient * gate * (1.0 + value * (1.0 - gate))
    return gradient


@jit
def _chunk_gradients(
    x, dy, mean, rstd, weight, bias, of_bias, of_weight, cells, channels, width, chunks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Gradients of bias and weight by a chunk of cells."""
    at, mask, columns, inside = _tile(cells, channels, ROWS, COLUMNS)
    normed, value, _, _ = _normed(x, at, mask, mean, rstd, weight, bias, channels, width, columns, inside)
    gradient = _before_silu(dy, at, mask, value, SILU)
    to = (tl.program_id(0) * chunks + tl.program_id(1)) * channels + columns
    tl.store(of_bias + to, tl.sum(gradient, 0), mask=inside)
    tl.store(of_weight + to, tl.sum(tl.where(mask, gradient * normed, 0.0), 0), mask=inside)


@jit
def _group_gradients(
    of_bias, of_weight, weight, first, second, cells, channels, width, chunks,
    CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Means over a group of the gradient of its normed values, and of that times them."""
    n, group = tl.program_id(0), tl.program_id(1)
    chunk, column = tl.arange(0, CHUNKS), tl.arange(0, WIDTH)
    mask = (chunk < chunks)[:, None] & (column < width)[None, :]
    at = (n * chunks + chunk[:, None]) * channels + group * width + column[None, :]
    weights = tl.load(weight + group * width + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    total, to = cells * width, n * tl.num_programs(1) + group
    tl.store(first + to, tl.sum(weights * tl.load(of_bias + at, mask=mask, other=0.0)) / total)
    tl.store(second + to, tl.sum(weights * tl.load(of_weight + at, mask=mask, other=0.0)) / total)


@jit
def _input_gradient(
    x, dy, dx, mean, rstd, weight, bias, first, second, cells, channels, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    at, mask, columns, inside = _tile(cells, channels, ROWS, COLUMNS)
    normed, value, weights, scale = _normed(
        x, at, mask, mean, rstd, weight, bias, channels, width, columns, inside
    )
    gradient = _before_silu(dy, at, mask, value, SILU) * weights[None, :]
    group = tl.program_id(0) * (channels // width) + columns // width
    shift = tl.load(first + group, mask=inside, other=0.0)[None, :]
    tilt = tl.load(second + group, mask=inside, other=0.0)[None, :]
    tl.store(dx + at, scale[None, :] * (gradient - shift - normed * tilt), mask=mask)
