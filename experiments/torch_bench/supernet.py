"""The DARTS supernet as modules, one object per candidate operation, edge by edge, and its mixing weights: a
Gumbel-softmax over operations and pairs (methods sections 3 and 4).

The weight of every candidate is an argument (`mix`). `plan` says which candidates exist on each edge, so the
same class is the full supernet and the discrete network that pruning leaves. Images are [N, C, H, W]; an operation of
stride s makes [N, C, H / s, W / s] of them. No convolution has a bias, no batch norm inside a cell a scale or a shift.
"""

from collections import OrderedDict
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor, nn

OPS = (
    "none", "max_pool_3x3", "avg_pool_3x3", "skip_connect",
    "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5",
)  # fmt: skip
Plan = list[list[list[int]]]  # [normal, reduction][edges] -> indices into OPS


class Zero(nn.Module):
    """`none`: the input's shape after the stride, times 0."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        """[N, C, H, W] -> zeros [N, C, H / stride, W / stride]."""
        return x[:, :, :: self.stride, :: self.stride].mul(0.0)


class FactorizedReduce(nn.Module):
    """Halves H and W: ReLU, two 1x1 convolutions of stride 2, one of them a pixel further, batch norm."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.even = nn.Conv2d(inputs, outputs // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(inputs, outputs // 2, 1, stride=2, bias=False)
        self.norm = norm(outputs)

    def forward(self, x):
        """[N, inputs, H, W] -> [N, outputs, H / 2, W / 2]."""
        x = torch.relu(x)
        return self.norm(torch.cat([self.even(x), self.odd(x[:, :, 1:, 1:])], dim=1))


def named(**modules: nn.Module) -> nn.Sequential:
    """One after another, under these names."""
    return nn.Sequential(OrderedDict(modules))


def norm(width: int) -> nn.BatchNorm2d:
    """The batch norm of a cell."""
    return nn.BatchNorm2d(width, affine=False)


def relu_conv_norm(inputs: int, outputs: int) -> nn.Sequential:
    """ReLU, 1x1 convolution, batch norm: [N, inputs, H, W] -> [N, outputs, H, W]."""
    return named(relu=nn.ReLU(), pointwise=nn.Conv2d(inputs, outputs, 1, bias=False), norm=norm(outputs))


def separable(width: int, size: int, stride: int, dilation: int = 1) -> nn.Sequential:
    """ReLU, depthwise convolution, 1x1 convolution, batch norm: `dil_conv`, and half of a `sep_conv`."""
    padding = dilation * (size - 1) // 2
    depthwise = nn.Conv2d(width, width, size, stride, padding, dilation, groups=width, bias=False)
    pointwise = nn.Conv2d(width, width, 1, bias=False)
    return named(relu=nn.ReLU(), depthwise=depthwise, pointwise=pointwise, norm=norm(width))


def operation(name: str, width: int, stride: int) -> nn.Module:
    """The candidate `name`, one of OPS, at `width` channels."""
    makers = {
        "none": lambda: Zero(stride),
        "max_pool_3x3": lambda: named(pool=nn.MaxPool2d(3, stride, 1), norm=norm(width)),
        "avg_pool_3x3": lambda: named(pool=nn.AvgPool2d(3, stride, 1, count_include_pad=False), norm=norm(width)),
        "skip_connect": lambda: nn.Identity() if stride == 1 else FactorizedReduce(width, width),
        "sep_conv_3x3": lambda: named(first=separable(width, 3, stride), second=separable(width, 3, 1)),
        "sep_conv_5x5": lambda: named(first=separable(width, 5, stride), second=separable(width, 5, 1)),
        "dil_conv_3x3": lambda: separable(width, 3, stride, dilation=2),
        "dil_conv_5x5": lambda: separable(width, 5, stride, dilation=2),
    }
    return makers[name]()


class MixedOp(nn.Module):
    """All candidates of one edge; the output is their weighted sum."""

    def __init__(self, candidates: list[int], width: int, stride: int):
        super().__init__()
        self.candidates = candidates
        self.ops = nn.ModuleDict({OPS[k]: operation(OPS[k], width, stride) for k in candidates})

    def forward(self, x, weights):
        """x [N, C, H, W], weights [ops] -> [N, C, H / stride, W / stride]."""
        return sum(weights[k] * self.ops[OPS[k]](x) for k in self.candidates)


class Cell(nn.Module):
    """Two preprocessed inputs, then nodes that sum mixed edges; the nodes are concatenated."""

    def __init__(self, before_last: int, last: int, width: int, nodes: int, plan, kind: int, after_reduction: bool):
        super().__init__()
        self.nodes, self.kind = nodes, kind  # 0 normal, 1 reduction
        self.preprocess_0 = (FactorizedReduce if after_reduction else relu_conv_norm)(before_last, width)
        self.preprocess_1 = relu_conv_norm(last, width)
        inputs = [i for j in range(nodes) for i in range(j + 2)]
        self.edges = nn.ModuleList(
            MixedOp(candidates, width, 2 if kind == 1 and i < 2 else 1)
            for i, candidates in zip(inputs, plan, strict=True)
        )

    def forward(self, s0, s1, mix):
        """s0, s1: outputs of the two cells before; mix [edges, ops] -> [N, nodes C, H', W']."""
        states = [self.preprocess_0(s0), self.preprocess_1(s1)]
        for j in range(self.nodes):
            first = j * (j + 3) // 2
            live = [(x, first + i) for i, x in enumerate(states) if self.edges[first + i].candidates]
            states.append(sum(self.edges[e](x, mix[e]) for x, e in live))
        return torch.cat(states[2:], dim=1)


class Supernet(nn.Module):
    """Stem, cells, global average pool, linear head.

    channels: of the images; mean, std: of their pixels in 0..1, per channel. plan: an operation for every node.
    """

    def __init__(
        self, *, channels: int, classes: int, mean, std, width=16, length=8, nodes=4, plan: Plan | None = None
    ):
        super().__init__()
        if plan is None:  # every operation on every edge
            plan = [[list(range(len(OPS)))] * (nodes * (nodes + 3) // 2)] * 2
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)
        before_last = last = 3 * width
        self.stem = nn.Conv2d(channels, last, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(last)
        self.cells = nn.ModuleList()
        after_reduction = False
        for i in range(length):
            reduces = i in (length // 3, 2 * length // 3)
            width *= 2 if reduces else 1
            self.cells.append(Cell(before_last, last, width, nodes, plan[reduces], int(reduces), after_reduction))
            before_last, last, after_reduction = last, nodes * width, reduces
        self.head = nn.Linear(last, classes)

    def forward(self, image, mix):
        """image [N, channels, H, W] uint8, mix [2, edges, ops] -> logits [N, classes]."""
        x = (image.float() / 255 - self.mean[:, None, None]) / self.std[:, None, None]
        s0 = s1 = self.stem_norm(self.stem(x))
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, mix[cell.kind])
        return self.head(s1.mean((2, 3)))


class Alpha(NamedTuple):
    """Free logits, Gumbel noise for them, or a mask of them (bool): one of each shape."""

    op: Tensor  # [2, edges, ops]
    pair: Tensor  # [2, pairs]


def masked_softmax(logits: Tensor, alive: Tensor) -> Tensor:
    """Softmax over the last axis of what is alive; a row with nothing alive is all 0."""
    # A row of -inf alone would be NaN, in the gradient too, so a dead row is computed whole and cleared.
    counted = alive | ~alive.any(-1, keepdim=True)
    return torch.softmax(logits.masked_fill(~counted, -torch.inf), -1) * alive


def gumbel(shape, generator: torch.Generator | None = None, device=None) -> Tensor:
    """-log(-log U) of float32 uniforms in (0, 1)."""
    tiny = torch.finfo(torch.float32).tiny
    u = torch.rand(shape, generator=generator, device=device).clamp_min(tiny)
    return -torch.log(-torch.log(u))


def mix(alpha: Alpha, mask: Alpha, temperature: float, noise: Alpha | None = None) -> Tensor:
    """[2, edges, ops]: Eq. 8's factor u_ij Z_k of every candidate; without `noise` the plain softmax.

    An edge normalises its operations, a node its pairs of inputs; what is masked weighs exactly 0. u_ij is the sum of
    the weights of node j's pairs that hold input i.
    """
    op, pair = alpha
    if noise is not None:
        op, pair = op + noise.op, pair + noise.pair
    z = masked_softmax(op / temperature, mask.op)
    edge_weights, first, nodes = [], 0, 0
    while first < pair.shape[-1]:
        pairs = list(combinations(range(nodes + 2), 2))
        mine = slice(first, first + len(pairs))
        weights = masked_softmax(pair[:, mine] / temperature, mask.pair[:, mine])
        for i in range(nodes + 2):
            edge_weights.append(sum(weights[:, p] for p, two in enumerate(pairs) if i in two))
        first, nodes = first + len(pairs), nodes + 1
    return torch.stack(edge_weights, 1)[..., None] * z
