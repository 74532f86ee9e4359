"""The graph of a DARTS cell and its plans: which operations exist, and how their weights are stacked.

Liu et al., ICLR 2019; methods sections 3.1 to 3.3. Inputs 0 and 1 of a cell are the outputs of the two cells before
it, input j + 2 is its own node j, which reads inputs 0 .. j + 1. A pair of node j is two of them; the pairs are what
Eq. 8 sums over.
"""

from itertools import combinations

import numpy as np

from fedmetanas_jax.core import Graph

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
NONE = OPS.index("none")
TYPES = ("normal", "reduce")

CellPlan = tuple[tuple[int, ...], ...]  # of one cell type: the operations alive on each edge; hashable


def darts_graph(nodes: int, cell_types: tuple[str, ...] = TYPES, every_edge: bool = False) -> Graph:
    """The cells of the DARTS space: 14 edges and 20 pairs for 4 nodes, all of which make up the output.

    every_edge: a node sums all its inputs, as in DARTS's own search, so there are no pairs to choose from.
    """
    pairs = tuple((j, *two) for j in range(nodes) for two in combinations(range(j + 2), 2))
    return Graph(cell_types, OPS, 2, tuple(edge_ends(nodes)), () if every_edge else pairs, tuple(range(nodes)))


def reductions(length: int) -> tuple[int, ...]:
    """Indices of the reduction cells: a third and two thirds of the way."""
    return tuple(sorted({length // 3, 2 * length // 3}))


def cell_sizes(shape: tuple[int, int, int], width: int, length: int) -> tuple[tuple[int, int, int], ...]:
    """(C, H, W) of what each cell reads, once it is preprocessed. A reduction is twice as wide as the cells before it,
    and what it hands on half as large."""
    sizes, (height, columns) = [], shape[:2]
    for i in range(length):
        factor = 2 if i in reductions(length) else 1
        width *= factor
        sizes.append((width, height, columns))
        height, columns = height // factor, columns // factor
    return tuple(sizes)


def edge_ends(nodes: int) -> list[tuple[int, int]]:
    """(input i, node j) of every edge, in order: node by node."""
    return [(i, j) for j in range(nodes) for i in range(j + 2)]


def num_nodes(plan: CellPlan) -> int:
    """Nodes n of the cell with that many edges, which are n(n + 3) / 2."""
    return round((2 * len(plan) + 2.25) ** 0.5 - 1.5)


def op_shapes(op: str, width: int, stride: int) -> dict[str, tuple[int, ...]]:
    """Weights of one operation at width C, by name; the second half of a separable convolution ends in _2."""
    if op == "skip_connect" and stride == 2:
        return {"even": (width // 2, width), "odd": (width // 2, width)}
    kind, _, size = op.partition("_conv_")
    if not size:
        return {}
    first = {"depthwise": (width, int(size[0]), int(size[0])), "pointwise": (width, width)}
    return first | ({f"{name}_2": shape for name, shape in first.items()} if kind == "sep" else {})


def stack_stride(op: str) -> int:
    """The stride of an operation where it has a stack: a skip connection has one where it halves the image alone."""
    return 2 if op == "skip_connect" else 1


def norm_names(op: str, stride: int) -> tuple[str, ...]:
    """Batch norms of one operation, of which `none` and the identity have none; the second one ends in _2."""
    if op == "none" or (op == "skip_connect" and stride == 1):
        return ()
    return ("norm", "norm_2") if op.startswith("sep") else ("norm",)


def carried(plan: CellPlan) -> np.ndarray:
    """[edges, ops] bool: the plan has the operation on the edge."""
    return np.array([[k in ops for k in range(len(OPS))] for ops in plan])


def stacked(plan: CellPlan, reduce: bool) -> dict[str, list[int]]:
    """{operation: the edges whose weights and moments of it are stacked, in order}.

    A skip connection has some where it halves the image: on a reduction cell's input edges.
    """
    ends, alive = edge_ends(num_nodes(plan)), carried(plan)
    strided = np.array([reduce and i < 2 for i, _ in ends])
    alive[:, OPS.index("skip_connect")] &= strided
    alive[:, NONE] = False
    return {op: np.flatnonzero(alive[:, k]).tolist() for k, op in enumerate(OPS)}


def stack_rows(plan: CellPlan, reduce: bool) -> dict[str, np.ndarray]:
    """{operation: [edges] int, the row of each edge in its stack; 0 where it has none}."""
    rows = {op: np.zeros(len(plan), int) for op in OPS}
    for op, edges in stacked(plan, reduce).items():
        rows[op][edges] = range(len(edges))
    return rows
