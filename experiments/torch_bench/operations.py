"""The eight candidate operations of the DARTS space as modules (methods section 3.2).

Images are [N, C, H, W]. No convolution has a bias, no batch norm inside a cell a scale or a shift.
"""

import torch
from torch import nn

OPS = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)


class Zero(nn.Module):
    """`none`: the input's shape after the stride, times 0."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        """[N, C, H, W] -> zeros [N, C, H / stride, W / stride]."""
        return x[:, :, :: self.stride, :: self.stride].mul(0.0)


class PoolNorm(nn.Module):
    """A pooling, then a batch norm."""

    def __init__(self, pool: nn.Module, width: int):
        super().__init__()
        self.pool = pool
        self.norm = nn.BatchNorm2d(width, affine=False)

    def forward(self, x):
        """[N, C, H, W] -> [N, C, H / stride, W / stride]."""
        return self.norm(self.pool(x))


class ReluConvNorm(nn.Module):
    """ReLU, 1x1 convolution, batch norm."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.relu = nn.ReLU()
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs, affine=False)

    def forward(self, x):
        """[N, inputs, H, W] -> [N, outputs, H, W]."""
        return self.norm(self.pointwise(self.relu(x)))


class FactorizedReduce(nn.Module):
    """Halves H and W: ReLU, two 1x1 convolutions of stride 2, one of them a pixel further, batch norm."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.relu = nn.ReLU()
        self.even = nn.Conv2d(inputs, outputs // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(inputs, outputs // 2, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(outputs, affine=False)

    def forward(self, x):
        """[N, inputs, H, W] -> [N, outputs, H / 2, W / 2]."""
        x = self.relu(x)
        return self.norm(torch.cat([self.even(x), self.odd(x[:, :, 1:, 1:])], dim=1))


class DepthwiseSeparable(nn.Module):
    """ReLU, depthwise convolution, 1x1 convolution, batch norm: `dil_conv`, and half of a `sep_conv`."""

    def __init__(self, width: int, size: int, stride: int, dilation: int):
        super().__init__()
        padding = dilation * (size - 1) // 2
        self.relu = nn.ReLU()
        self.depthwise = nn.Conv2d(width, width, size, stride, padding, dilation, groups=width, bias=False)
        self.pointwise = nn.Conv2d(width, width, 1, bias=False)
        self.norm = nn.BatchNorm2d(width, affine=False)

    def forward(self, x):
        """[N, C, H, W] -> [N, C, H / stride, W / stride]."""
        return self.norm(self.pointwise(self.depthwise(self.relu(x))))


class SeparableTwice(nn.Module):
    """`sep_conv`: two depthwise-separable convolutions, the stride in the first."""

    def __init__(self, width: int, size: int, stride: int):
        super().__init__()
        self.first = DepthwiseSeparable(width, size, stride, 1)
        self.second = DepthwiseSeparable(width, size, 1, 1)

    def forward(self, x):
        """[N, C, H, W] -> [N, C, H / stride, W / stride]."""
        return self.second(self.first(x))


def operation(name: str, width: int, stride: int) -> nn.Module:
    """The candidate `name` (one of OPS) at `width` channels. KeyError for another name."""
    makers = {
        "none": lambda: Zero(stride),
        "max_pool_3x3": lambda: PoolNorm(nn.MaxPool2d(3, stride, 1), width),
        "avg_pool_3x3": lambda: PoolNorm(nn.AvgPool2d(3, stride, 1, count_include_pad=False), width),
        "skip_connect": lambda: nn.Identity() if stride == 1 else FactorizedReduce(width, width),
        "sep_conv_3x3": lambda: SeparableTwice(width, 3, stride),
        "sep_conv_5x5": lambda: SeparableTwice(width, 5, stride),
        "dil_conv_3x3": lambda: DepthwiseSeparable(width, 3, stride, 2),
        "dil_conv_5x5": lambda: DepthwiseSeparable(width, 5, stride, 2),
    }
    return makers[name]()
