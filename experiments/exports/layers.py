"""A network as a list of steps in terms that every format has: convolutions, batch norms, pools, sums.

The training program is written for training: loops over edges, barriers, conditionals, depthwise convolutions as
shifted sums. None of that is of use to whoever only wants the function, so it is said again here, layer by layer, and
`check` compares the two.

Images are [n, C, h, w] in these terms; whether a format lays them out so is its own affair.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fedmetanas_jax.core import Graph
from fedmetanas_jax.models.batchnorm import BN_EPSILON

# Every operation and its settings; what weights it has is in brackets.
#   normalize mean, std           image [n, h, w, C] uint8 -> [n, C, h, w] float32
#   conv stride, dilation, groups [kernel [O, I / groups, k, k]], zero padding dilation (k - 1) / 2
#   norm epsilon                  [mean, var, and scale and shift or neither], each [C]
#   relu, hard_swish, hard_sigmoid
#   max_pool, avg_pool stride     3x3, padding 1, which the mean does not count
#   mean_pool                     2x2, stride 2
#   crop                          without its first row and column
#   zeros stride                  the input's shape after the stride, of zeros
#   scale factor                  times a number
#   add, concat                   of one or more inputs; concat joins channels
#   gate                          [n, C, h, w] times [n, C]
#   global_pool                   [n, C, h, w] -> [n, C]
#   linear                        [kernel [O, I], bias [O]], [n, I] -> [n, O]
IMAGE = "image"  # the name of the network's input


class Step(NamedTuple):
    """One operation; its name is that of its result too."""

    name: str  # unique; parts of parts after dots
    op: str
    inputs: tuple[str, ...]
    weights: dict[str, np.ndarray]
    settings: dict


class Layers:
    """Collects the steps of a network; the last one's result are the logits."""

    def __init__(self):
        self.steps: list[Step] = []

    def add(self, op: str, name: str, *inputs: str, weights: dict | None = None, **settings) -> str:
        """Appends a step -> its name."""
        arrays = {n: np.ascontiguousarray(x, np.float32) for n, x in (weights or {}).items()}
        self.steps.append(Step(name, op, inputs, arrays, settings))
        return name

    def conv(self, name: str, x: str, kernel, stride: int = 1, dilation: int = 1) -> str:
        """As the project keeps kernels: pointwise [O, I], depthwise [C, k, k], dense [O, I, k, k]."""
        kernel = np.asarray(kernel)
        groups = len(kernel) if kernel.ndim == 3 else 1
        kernel = kernel[:, :, None, None] if kernel.ndim == 2 else kernel[:, None] if kernel.ndim == 3 else kernel
        return self.add("conv", name, x, weights={"kernel": kernel}, stride=stride, dilation=dilation, groups=groups)

    def norm(self, name: str, x: str, moments: dict, scale=None, shift=None, epsilon: float = BN_EPSILON) -> str:
        """Batch norm by its running moments."""
        weights = {"mean": moments["mean"], "var": moments["var"]}
        if scale is not None:
            weights |= {"scale": scale, "shift": shift}
        return self.add("norm", name, x, weights=weights, epsilon=epsilon)

    def cell(self, name: str, graph: Graph, plan, mix, inputs: list[str], run: Callable, stride: int = 1) -> list[str]:
        """Writes a cell of a search space out, node by node -> its nodes.

        plan and mix are those of its type; run(name, operation, edge, input's number, input) -> the operation's result.
        Nodes that nothing reaches are zeros; stride: how much smaller than its inputs they are.
        """
        states = [*inputs]
        for j in range(1 + max(end for _, end in graph.edges)):
            terms = []
            for e, (start, end) in enumerate(graph.edges):
                for k in plan[e] if end == j else ():
                    if (op := graph.ops[k]) != "none":
                        where = f"{name}.edge_{e}.{op}"
                        y = run(where, op, e, start, states[start])
                        weight = float(mix[e, k])  # 1 in what searches leave
                        terms.append(y if weight == 1 else self.add("scale", f"{where}.weighed", y, factor=weight))
            if not terms:
                states.append(self.add("zeros", f"{name}.node_{j}", inputs[0], stride=stride))
            else:
                states.append(terms[0] if len(terms) == 1 else self.add("add", f"{name}.node_{j}", *terms))
        return states[len(inputs) :]
