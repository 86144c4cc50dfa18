"""How tensors lie in memory."""

from torch import Tensor


def same_order(one: Tensor, other: Tensor) -> bool:
    """Whether the elements of two tensors of one shape lie alike; strides of a dimension of 1 say nothing.

    The gradient of a 1x1 convolution's weight in channels_last [O, C, 1, 1] has strides of (C, 1, 1, 1), the
    weight itself (C, 1, C, C).
    """
    sizes = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(a == b for size, a, b in sizes if size > 1)
