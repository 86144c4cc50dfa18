"""1x1 convolutions as the matrix products that they are."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: [B, C, h, w], weight: [D, C, 1, 1], bias: [D] -> [B, D, h, w].

    Channels_last cells are the rows of a matrix: its product takes a CPU half of the time of a convolution.
    """
    if not x.is_contiguous(memory_format=torch.channels_last):
        return F.conv2d(x, weight, bias)
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


class Conv1x1(nn.Conv2d):
    """A Conv2d of kernel size 1, by `conv1x1`. [B, in_channels, h, w] -> [B, out_channels, h, w].

    It is built as any Conv2d, for lycoris builds its own layers by the type of the adapted one.
    """

    def forward(self, x: Tensor) -> Tensor:
        return conv1x1(x, self.weight, self.bias)
