"""One DARTS cell with what is alike side by side: few large kernels, for devices that launch each on its own.

`scan` loops over the edges of a cell, which a CPU likes and a GPU does not: it launches the kernels of every edge
anew and may have to ask the host about every conditional. Here a cell is written out source by source. The edges
that leave a source, and the operations of a family on them, are rows of one array: one matrix product serves their
pointwise layers, one reduction their batch norms. What is dead is not there, so a pruned plan is a smaller program
without loops or conditionals. Same numbers as `scan` up to rounding; results/formulations.md says what either costs.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedmetanas_jax.core import Array, Tree
from fedmetanas_jax.models import batchnorm, layers, operations
from fedmetanas_jax.models.operations import Op
from fedmetanas_jax.models.plan import NONE, OPS, CellPlan, carried, edge_ends, num_nodes, op_shapes, stack_rows
from fedmetanas_jax.models.space import groups_of

# Operations whose layers can be rows of one array: as many layers, over images of one size.
FAMILIES = (("sep_conv_3x3", "sep_conv_5x5"), ("dil_conv_3x3", "dil_conv_5x5"), ("skip_connect",))


class Source(NamedTuple):
    """An input of the cell and the live edges that leave it."""

    number: int
    stride: int
    edges: list[int]  # ascending
    on: dict[str, list[int]]  # operation -> which of `edges`, by place, carry it
    own: list[str]  # live operations with weights
    shared: tuple[Op, ...]  # live operations without


def sources(plan: CellPlan, reduce: bool) -> list[Source]:
    """Those of a cell, in an order in which each is complete when it is read."""
    nodes, found = num_nodes(plan), []
    for i in range(nodes + 1):
        edges = [e for e, (start, _) in enumerate(edge_ends(nodes)) if start == i and {*plan[e]} - {NONE}]
        stride = 2 if reduce and i < 2 else 1
        on = {op: [n for n, e in enumerate(edges) if k in plan[e]] for k, op in enumerate(OPS) if k != NONE}
        alive = [op for op in on if on[op]]
        own = [op for op in alive if op_shapes(op, 2, stride)]
        shared = tuple(Op(OPS.index(op), True) for op in alive if op not in own)
        if edges:
            found.append(Source(i, stride, edges, on, own, shared))
    return found


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def summed(x: Array, places: tuple[int, ...], count: int) -> Array:
    """Sums of the rows x [n, ...] that have the same place: [count, ...]; its gradient, too, is a selection."""
    rows = [[x[n] for n, place in enumerate(places) if place == p] for p in range(count)]
    return jnp.stack([sum(found[1:], found[0]) if found else jnp.zeros_like(x[0]) for found in rows])


summed.defvjp(lambda x, *static: (summed(x, *static), None), lambda places, _, __, g: (g[np.array(places)],))


def unrolled_cell(
    inputs: Array, weights: Tree, stats: Tree, mix: Array, plan: CellPlan, reduce: bool, train: bool
) -> tuple[Array, Tree]:
    """As `scan.scanned_cell`: inputs [2, C, H, W, N] -> ([nodes, C, H', W', N], moments of its batch norms)."""
    found, nodes, rows = sources(plan, reduce), num_nodes(plan), stack_rows(plan, reduce)
    mix = jnp.where(carried(plan), mix, 0)
    given: list[dict] = [{} for _ in found]  # of every source: {op: {name: weights [carriers, ...]}}
    for op, named in weights.items():
        here = [n for n, source in enumerate(found) if op in source.own]
        groups = tuple(tuple(rows[op][found[n].edges][found[n].on[op]].tolist()) for n in here)
        for name, x in named.items():
            for n, part in zip(here, groups_of(x, groups) if here else (), strict=True):
                given[n].setdefault(op, {})[name] = part
    height, width = (n // 2 if reduce else n for n in inputs.shape[2:4])
    empty = jnp.zeros((inputs.shape[1], height, width, inputs.shape[4]), inputs.dtype)
    states: list = [*inputs, *[None] * nodes]
    moments = []
    for source, weights_here in zip(found, given, strict=True):
        known = None
        if not train:  # of operations without weights for every edge, carried or not
            edges = {op: source.on[op] for op in source.own}
            edges |= {op.name: slice(None) for op in source.shared if op.name in stats}
            at = {op: rows[op][source.edges][places] for op, places in edges.items()}
            known = {op: jax.tree.map(lambda x, where=where: x[where], stats[op]) for op, where in at.items()}
        x = empty if states[source.number] is None else states[source.number]
        y, seen = _visit(source, x, weights_here, known, mix[np.array(source.edges)])
        for n, e in enumerate(source.edges):
            j = edge_ends(nodes)[e][1] + 2
            states[j] = y[n] if states[j] is None else states[j] + y[n]
        moments += [(op, np.array(source.edges)[source.on[op]], here) for op, here in seen.items()]
    out = jnp.stack([empty if state is None else state for state in states[2:]])
    return out, operations.in_edge_order(moments)


def _visit(source: Source, x: Array, weights: Tree, known: Tree | None, mix: Array):
    """What leaves one source: x [C, H, W, N] -> (y [edges, C, H', W', N], {op: {name: moments [carriers, C]}}).

    weights {op: {name: [carriers, ...]}}, mix [edges, ops]; `known` moments to normalise by, or None for the
    batch's own.
    """
    total, moments = 0.0, {}
    if source.shared:
        total, seen = operations.weightless(source.shared, source.stride, x, known, mix, np.ones(len(OPS), bool))
        for op, found in seen.items():
            count = len(source.on[op])
            moments[op] = jax.tree.map(lambda m, count=count: jnp.broadcast_to(m, (count, *m.shape)), found)
    relu_x = lax.optimization_barrier(jax.nn.relu(x))
    for family in FAMILIES:
        ops = [op for op in family if op in source.own]
        if ops:
            y, seen = _family(source, ops, relu_x, weights, known, mix)
            total, moments = total + y, moments | seen
    return total, moments


def _family(source: Source, ops: list[str], relu_x: Array, weights: Tree, known: Tree | None, mix: Array):
    """What operations of one family add, and the moments they found."""
    places = [n for op in ops for n in source.on[op]]
    weight = jnp.concatenate([mix[np.array(source.on[op]), OPS.index(op)] for op in ops])
    ends = np.cumsum([len(source.on[op]) for op in ops])[:-1]
    found: dict = {op: {} for op in ops}

    def norm(name, z, weight=None):
        """Batch norm `name` of every row of z, times `weight` [rows]."""
        given = None
        if known is not None:
            given = jax.tree.map(lambda *m: jnp.concatenate(m), *[known[op][name] for op in ops])
        y, moments = jax.vmap(batchnorm.norm)(z, given, weight)
        for n, op in enumerate(ops):
            found[op][name] = jax.tree.map(lambda m, n=n: jnp.split(m, ends)[n], moments)
        return y

    def separable(which, stride, xs):
        """A depthwise and a pointwise layer of each operation: xs [C, H, W, N] or one a row -> [rows, ...]."""
        run = partial(layers.depthwise, stride=stride, dilation=2 if ops[0].startswith("dil") else 1)
        middle = [
            jax.vmap(run, (None if x.ndim == 4 else 0, 0))(x, weights[op][f"depthwise{which}"])
            for x, op in zip(xs, ops, strict=True)
        ]
        pointwise = jnp.concatenate([weights[op][f"pointwise{which}"] for op in ops])
        return jax.vmap(layers.pointwise)(layers.settled(jnp.concatenate(middle)), pointwise)

    last = "norm"
    if ops == ["skip_connect"]:
        halved = jax.vmap(operations.factorized_reduce, (None, 0, 0))
        z = halved(relu_x, weights[ops[0]]["even"], weights[ops[0]]["odd"])
    else:
        z = separable("", source.stride, [relu_x] * len(ops))
        if ops[0].startswith("sep"):
            z, last = separable("_2", 1, jnp.split(jax.nn.relu(norm("norm", z)), ends)), "norm_2"
    return summed(norm(last, z, weight), tuple(places), len(source.edges)), found
