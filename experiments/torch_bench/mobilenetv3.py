"""MobileNetV3 as modules, from methods section 9.1: the network of the conventional methods.

Images are [N, C, H, W]; batch norm has eps 1e-3 and momentum 0.01.
"""

import torch
from torch import nn

LARGE = {
    "stem": 16,
    # kernel, expanded channels, output channels, squeeze-and-excite, activation, stride
    "blocks": (
        (3, 16, 16, False, "RE", 1), (3, 64, 24, False, "RE", 2), (3, 72, 24, False, "RE", 1),
        (5, 72, 40, True, "RE", 2), (5, 120, 40, True, "RE", 1), (5, 120, 40, True, "RE", 1),
        (3, 240, 80, False, "HS", 2), (3, 200, 80, False, "HS", 1), (3, 184, 80, False, "HS", 1),
        (3, 184, 80, False, "HS", 1), (3, 480, 112, True, "HS", 1), (3, 672, 112, True, "HS", 1),
        (5, 672, 160, True, "HS", 2), (5, 960, 160, True, "HS", 1), (5, 960, 160, True, "HS", 1),
    ),
    "last": 960,
    "hidden": 1280,
}  # fmt: skip
TINY = {  # a small network of the same parts, for tests
    "stem": 8,
    "blocks": ((3, 8, 8, False, "RE", 1), (3, 24, 16, True, "RE", 2), (5, 48, 16, True, "HS", 1)),
    "last": 48,
    "hidden": 64,
}
VARIANTS = {"large": LARGE, "tiny": TINY}
ACTIVATIONS = {"RE": nn.ReLU, "HS": nn.Hardswish, "": nn.Identity}


def make_divisible(value: float, divisor: int = 8) -> int:
    """The multiple of `divisor` nearest to `value`, at most 10 % below it."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, activation."""

    def __init__(self, inputs: int, outputs: int, size: int = 1, stride: int = 1, groups: int = 1, act: str = ""):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, (size - 1) // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01)
        self.act = ACTIVATIONS[act]()
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out")

    def forward(self, x):
        """[N, inputs, H, W] -> [N, outputs, H / stride, W / stride], rounded up."""
        return self.act(self.norm(self.conv(x)))


class SqueezeExcite(nn.Module):
    """Every channel times a gate computed from all channels' means."""

    def __init__(self, width: int):
        super().__init__()
        self.squeeze = nn.Conv2d(width, make_divisible(width / 4), 1)
        self.excite = nn.Conv2d(make_divisible(width / 4), width, 1)

    def forward(self, x):
        """[N, width, H, W] -> the same shape."""
        gate = torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))
        return x * nn.functional.hardsigmoid(self.excite(gate))


class Block(nn.Module):
    """Inverted residual: expand, depthwise, squeeze and excite, project."""

    def __init__(self, inputs: int, size: int, expand: int, outputs: int, gated: bool, act: str, stride: int):
        super().__init__()
        self.residual = stride == 1 and inputs == outputs
        self.expand = nn.Identity() if expand == inputs else ConvNorm(inputs, expand, act=act)
        self.depthwise = ConvNorm(expand, expand, size, stride, groups=expand, act=act)
        self.gate = SqueezeExcite(expand) if gated else nn.Identity()
        self.project = ConvNorm(expand, outputs)

    def forward(self, x):
        """[N, inputs, H, W] -> [N, outputs, H / stride, W / stride]."""
        y = self.project(self.gate(self.depthwise(self.expand(x))))
        return x + y if self.residual else y


class MobileNetV3(nn.Module):
    """The whole network. stem: stride of the first convolution (D-26); variant: a key of VARIANTS."""

    def __init__(self, *, channels: int, classes: int, mean, std, stem: int = 1, variant: str = "large", dropout=0.2):
        super().__init__()
        numbers = VARIANTS[variant]
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)
        width = numbers["stem"]
        self.stem = ConvNorm(channels, width, 3, stem, act="HS")
        self.blocks = nn.ModuleList()
        for size, expand, outputs, gated, act, stride in numbers["blocks"]:
            self.blocks.append(Block(width, size, expand, outputs, gated, act, stride))
            width = outputs
        self.last = ConvNorm(width, numbers["last"], act="HS")
        self.hidden = nn.Linear(numbers["last"], numbers["hidden"])
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(numbers["hidden"], classes)
        for linear in (self.hidden, self.head):
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)

    def forward(self, image):
        """image [N, channels, H, W] uint8 -> logits [N, classes]."""
        x = (image.float() / 255 - self.mean[:, None, None]) / self.std[:, None, None]
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = self.last(x).mean((2, 3))
        return self.head(self.dropout(nn.functional.hardswish(self.hidden(x))))
