"""Which operations of the DARTS supernet exist: its plans, what they cost, and how one is cut to a smaller one."""

import jax
import numpy as np

from fedmetanas_jax.core import Tree
from fedmetanas_jax.models import operations
from fedmetanas_jax.topology import OPS, edge_ends

Plan = tuple[operations.Keep, operations.Keep]  # operations alive on each edge of normal and reduction cells
STEM_MULTIPLIER = 3


def full_plan(nodes: int) -> Plan:
    """Every operation on every edge."""
    edges = len(edge_ends(nodes))
    return ((tuple(range(len(OPS))),) * edges,) * 2


def reductions(length: int) -> tuple[int, ...]:
    """Indices of the reduction cells: a third and two thirds of the way."""
    return tuple(sorted({length // 3, 2 * length // 3}))


def multiply_adds(shape, classes: int, width: int, length: int, nodes: int, plan: Plan) -> int:
    """Multiply-adds of convolutions and head for one image; batch norm, pooling and sums are not counted."""
    ends = edge_ends(nodes)
    area = shape[0] * shape[1]
    stem = STEM_MULTIPLIER * width
    total = 9 * shape[2] * stem * area
    before_last = last = stem
    for i in range(length):
        reduce = i in reductions(length)
        width *= 2 if reduce else 1
        # The older input still has the size from before the last reduction; its 1x1 runs at half of it.
        total += (before_last + last) * width * area
        area //= 4 if reduce else 1
        for (start, _), ops in zip(ends, plan[int(reduce)], strict=True):
            stride = 2 if reduce and start < 2 else 1
            for k in ops:
                shapes = operations.op_shapes(OPS[k], width, stride)
                total += area * sum(int(np.prod(s)) for s in shapes.values())
        before_last, last = last, nodes * width
    return total + last * classes


def carry_over(tree: Tree, length: int, nodes: int, old: Plan, new: Plan) -> Tree:
    """Weights or moments of the network with plan `old`, cut to plan `new` (which it contains).

    Works on any tree laid out like `params` or `stats`, so on optimizer states of either too.
    """
    pruned = dict(tree)
    for i in range(length):
        reduce = i in reductions(length)
        kind = int(reduce)
        block = dict(tree[f"cell_{i}"])
        for k, op in enumerate(OPS):
            if op not in block:
                continue
            had, _ = operations.stack(old[kind], k, nodes, reduce)
            has, _ = operations.stack(new[kind], k, nodes, reduce)
            rows = np.array([had.index(e) for e in has], int)
            block[op] = jax.tree.map(lambda x, rows=rows: x[rows], block[op])
            if not has:
                del block[op]
        pruned[f"cell_{i}"] = block
    return pruned
