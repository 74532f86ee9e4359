"""The DARTS supernet as modules: one object per candidate operation, edge by edge (methods section 3.1).

The weight of every candidate is an argument (`mix`). `plan` says which candidates exist on each edge, so the
same class is the full supernet and the discrete network that pruning leaves.
"""

import torch
from torch import nn

from torch_bench.operations import OPS, FactorizedReduce, ReluConvNorm, operation

Plan = list[list[list[int]]]  # [normal, reduction][edges] -> indices into OPS


def full_plan(nodes: int) -> Plan:
    """Every operation on every edge."""
    edges = nodes * (nodes + 3) // 2
    return [[list(range(len(OPS))) for _ in range(edges)] for _ in range(2)]


def reductions(length: int) -> set[int]:
    """Indices of the reduction cells."""
    return {length // 3, 2 * length // 3}


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

    def __init__(self, before_last: int, last: int, width: int, nodes: int, plan, reduce: bool, after_reduction: bool):
        super().__init__()
        self.nodes = nodes
        self.preprocess_0 = (FactorizedReduce if after_reduction else ReluConvNorm)(before_last, width)
        self.preprocess_1 = ReluConvNorm(last, width)
        inputs = [i for j in range(nodes) for i in range(j + 2)]
        self.edges = nn.ModuleList(
            MixedOp(candidates, width, 2 if reduce and i < 2 else 1)
            for i, candidates in zip(inputs, plan, strict=True)
        )

    def forward(self, s0, s1, mix):
        """s0, s1: outputs of the two cells before; mix [edges, ops] -> [N, nodes C, H', W']."""
        states = [self.preprocess_0(s0), self.preprocess_1(s1)]
        edge = 0
        for j in range(self.nodes):
            terms = []
            for x in states[: j + 2]:
                if self.edges[edge].candidates:
                    terms.append(self.edges[edge](x, mix[edge]))
                edge += 1
            states.append(sum(terms))
        return torch.cat(states[2:], dim=1)


class Supernet(nn.Module):
    """Stem, cells, global average pool, linear head.

    channels: of the images; mean, std: of their pixels in 0..1, per channel. ValueError for a plan that
    leaves a node without any operation.
    """

    def __init__(
        self, *, channels: int, classes: int, mean, std, width=16, length=8, nodes=4, plan: Plan | None = None
    ):
        super().__init__()
        plan = full_plan(nodes) if plan is None else plan
        for cell in plan:
            for j in range(nodes):
                first = j * (j + 3) // 2
                if not any(cell[first : first + j + 2]):
                    raise ValueError(f"the plan leaves node {j} without any operation: {cell}")
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)
        before_last = last = 3 * width
        self.stem = nn.Conv2d(channels, last, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(last)
        self.cells = nn.ModuleList()
        after_reduction = False
        for i in range(length):
            reduce = i in reductions(length)
            width *= 2 if reduce else 1
            cell = Cell(before_last, last, width, nodes, plan[int(reduce)], reduce, after_reduction)
            cell.kind = int(reduce)
            self.cells.append(cell)
            before_last, last, after_reduction = last, nodes * width, reduce
        self.head = nn.Linear(last, classes)

    def forward(self, image, mix):
        """image [N, channels, H, W] uint8, mix [2, edges, ops] -> logits [N, classes]."""
        x = (image.float() / 255 - self.mean[:, None, None]) / self.std[:, None, None]
        s0 = s1 = self.stem_norm(self.stem(x))
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, mix[cell.kind])
        return self.head(s1.mean((2, 3)))
