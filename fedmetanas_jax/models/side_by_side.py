"""One DARTS cell with what is alike side by side: few large kernels, for devices that launch each on its own.

`cell.run_stage` loops over the edges of a cell, which a CPU likes and a GPU does not: it launches the kernels of
every edge anew and may have to ask the host about every conditional. Here a cell is written out source by
source. The edges that leave a source, and the operations of a family on them, are rows of one array: one matrix
product serves their pointwise layers, one reduction their batch norms. What is dead is not there, so a pruned plan
is a smaller program without loops or conditionals.

Same numbers as `cell.cell` up to rounding; results/formulations.md says what either costs.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedmetanas_jax.core import Array, Tree
from fedmetanas_jax.models import batchnorm, layers, operations
from fedmetanas_jax.models.operations import Keep, Op
from fedmetanas_jax.topology import NONE, OPS, edge_ends

# Operations whose layers can be rows of one array: as many layers, over images of one size.
FAMILIES = (("sep_conv_3x3", "sep_conv_5x5"), ("dil_conv_3x3", "dil_conv_5x5"), ("skip_connect",))


class Source(NamedTuple):
    """An input of the cell and the live edges that leave it; hashable, so static under jit."""

    keep: Keep
    edges: tuple[int, ...]  # ascending
    stride: int

    def carriers(self, op: str) -> list[int]:
        """Which of `edges`, by place, carry the operation."""
        return [n for n, e in enumerate(self.edges) if OPS.index(op) in self.keep[e]]

    @property
    def own(self) -> list[str]:
        """Operations with weights that are alive here."""
        return [op for op in OPS if operations.op_shapes(op, 2, self.stride) and self.carriers(op)]

    @property
    def shared(self) -> tuple[Op, ...]:
        """Operations without weights that are alive here."""
        ops = [k for k, op in enumerate(OPS) if k != NONE and not operations.op_shapes(op, 2, self.stride)]
        return tuple(Op(k, True) for k in ops if self.carriers(OPS[k]))


def sources(keep: Keep, nodes: int, reduce: bool) -> list[tuple[int, Source]]:
    """(input of the cell, source) in an order in which each is complete when it is read."""
    ends, found = edge_ends(nodes), []
    for i in range(nodes + 1):
        edges = tuple(e for e, (start, _) in enumerate(ends) if start == i and {*keep[e]} - {NONE})
        if edges:
            found.append((i, Source(keep, edges, 2 if reduce and i < 2 else 1)))
    return found


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def apart(x: Array, groups: tuple[tuple[int, ...], ...]) -> tuple[Array, ...]:
    """The rows of x, each in one group. Its gradient is a selection, where the automatic one would be scatters."""
    return tuple(x[np.array(rows)] for rows in groups)


def _apart_backward(groups, _, grads):
    return (jnp.concatenate(grads)[np.argsort(np.concatenate(groups))],)


apart.defvjp(lambda x, groups: (apart(x, groups), None), _apart_backward)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def summed(x: Array, places: tuple[int, ...], count: int) -> Array:
    """Sums of the rows x [n, ...] that have the same place: [count, ...]; its gradient, too, is a selection."""
    rows = [[x[n] for n, place in enumerate(places) if place == p] for p in range(count)]
    return jnp.stack([sum(found[1:], found[0]) if found else jnp.zeros_like(x[0]) for found in rows])


summed.defvjp(lambda x, *static: (summed(x, *static), None), lambda places, _, __, g: (g[np.array(places)],))


def cell(
    inputs: Array, weights: Tree, stats: Tree, mix: Array, keep: Keep, nodes: int, reduce: bool, train: bool, how
) -> tuple[Array, Tree]:
    """As `cell.cell` has it: inputs [2, C, H, W, N] -> ([nodes, C, H', W', N], moments of its batch norms)."""
    found, ends = sources(keep, nodes, reduce), edge_ends(nodes)
    carried = np.array([[k in ops for k in range(len(OPS))] for ops in keep])
    mix = jnp.where(carried, mix, 0)
    held = {op: _rows(op, keep, nodes, reduce) for op in OPS}
    parts = {op: _by_source(op, named, [s for _, s in found], held[op]) for op, named in weights.items()}
    height, width = (n // 2 if reduce else n for n in inputs.shape[2:4])
    empty = jnp.zeros((inputs.shape[1], height, width, inputs.shape[4]), inputs.dtype)
    states: list = [*inputs, *[None] * nodes]
    moments: dict = {}
    for i, source in found:
        given = {op: parts[op][source] for op in source.own}
        known = None if train else _known(source, stats, held)
        visit = partial(_visit, source, how.kernel)
        visit = jax.checkpoint(visit) if how.remat and train else visit
        x = empty if states[i] is None else states[i]
        y, seen = visit(x, given, known, mix[np.array(source.edges)])
        for n, e in enumerate(source.edges):
            j = ends[e][1] + 2
            states[j] = y[n] if states[j] is None else states[j] + y[n]
        for op, by_name in seen.items():
            for name, pair in by_name.items():
                edges = [source.edges[n] for n in source.carriers(op)]
                moments.setdefault(op, {}).setdefault(name, []).append((edges, pair))
    out = jnp.stack([empty if state is None else state for state in states[2:]])
    return out, {op: {name: _in_order(parts) for name, parts in by_name.items()} for op, by_name in moments.items()}


def _rows(op: str, keep: Keep, nodes: int, reduce: bool) -> dict[int, int]:
    """{edge: its row in the stack of the operation}."""
    return {e: n for n, e in enumerate(operations.stack(keep, OPS.index(op), nodes, reduce)[0])}


def _by_source(op: str, named: Tree, every: list[Source], held: dict[int, int]) -> dict[Source, Tree]:
    """{source: weights of the operation on its edges, by name}."""
    carrying = [source for source in every if op in source.own]
    rows = tuple(tuple(held[s.edges[n]] for n in s.carriers(op)) for s in carrying)
    pieces = {name: apart(x, rows) for name, x in named.items()} if carrying else {}
    return {s: {name: piece[n] for name, piece in pieces.items()} for n, s in enumerate(carrying)}


def _known(source: Source, stats: Tree, held: dict[str, dict[int, int]]) -> Tree:
    """Moments to normalise by, of a source's edges: [carriers, C], of operations without weights [edges, C]."""
    known = {}
    for op in (*source.own, *(OPS[o.number] for o in source.shared)):
        if operations.has_norm(op, source.stride):
            edges = source.edges if op not in source.own else [source.edges[n] for n in source.carriers(op)]
            rows = np.array([held[op].get(e, 0) for e in edges])
            known[op] = jax.tree.map(lambda x, rows=rows: x[rows], stats[op])
    return known


def _in_order(parts: list) -> tuple[Array, Array]:
    order = np.argsort(np.concatenate([edges for edges, _ in parts]))
    return jax.tree.map(lambda *m: jnp.concatenate(m)[order], *[pair for _, pair in parts])


def _visit(source: Source, kernel: str, x: Array, weights: Tree, known: Tree | None, mix: Array):
    """What leaves one source: x [C, H, W, N] -> (y [edges, C, H', W', N], {op: {name: moments [carriers, C]}}).

    weights {op: {name: [carriers, ...]}}, mix [edges, ops]; `known` moments to normalise by, or None for the
    batch's own.
    """
    total, moments = 0.0, {}
    if source.shared:
        total, seen = operations.weightless(source.shared, source.stride, x, known, mix, np.ones(len(OPS), bool))
        for op, by_name in seen.items():
            count = len(source.carriers(op))
            moments[op] = jax.tree.map(lambda m, count=count: jnp.broadcast_to(m, (count, *m.shape)), by_name)
    relu_x = lax.optimization_barrier(jax.nn.relu(x))
    for family in FAMILIES:
        alive = [op for op in family if op in source.own]
        # The Pallas kernels write each operation's layers to an array of its own.
        for ops in [alive] if kernel == "plain" else [[op] for op in alive]:
            if ops:
                y, seen = _family(source, ops, kernel, relu_x, weights, known, mix)
                total, moments = total + y, moments | seen
    return total, moments


def _family(source: Source, ops: list[str], kernel: str, relu_x: Array, weights: Tree, known: Tree | None, mix: Array):
    """What operations of one family add, and the moments they found."""
    places = [n for op in ops for n in source.carriers(op)]
    weight = jnp.concatenate([mix[np.array(source.carriers(op)), OPS.index(op)] for op in ops])
    ends = np.cumsum([len(source.carriers(op)) for op in ops])[:-1]
    found: dict = {op: {} for op in ops}

    def norm(name, z, sums, weight=None):
        """Batch norm `name` of every row of z, times `weight` [rows]."""
        if known is not None:
            given = jax.tree.map(lambda *m: jnp.concatenate(m), *[known[op][name] for op in ops])
            y = jax.vmap(batchnorm.frozen_norm)(z, *given)
            return y if weight is None else weight[:, None, None, None, None].astype(y.dtype) * y
        one = jnp.ones(len(z), jnp.promote_types(z.dtype, jnp.float32)) if weight is None else weight
        y, *pair = jax.vmap(lambda z, w, sums: batchnorm.weighted_norm(z, w, known=sums))(z, one, sums)
        for op, *m in zip(ops, *(jnp.split(m, ends) for m in pair), strict=True):
            found[op][name] = tuple(m)
        return y

    if ops == ["skip_connect"]:
        halved = jax.vmap(operations.factorized_reduce, (None, 0, 0))
        z, sums, last = halved(relu_x, weights[ops[0]]["even"], weights[ops[0]]["odd"]), None, "norm"
    else:
        z, sums, last = *_separable(source.stride, ops, kernel, [relu_x] * len(ops), weights, ""), "norm"
        if ops[0].startswith("sep"):
            again = jnp.split(jax.nn.relu(norm("norm", z, sums)), ends)
            z, sums, last = *_separable(1, ops, kernel, again, weights, "_2"), "norm_2"
    return summed(norm(last, z, sums, weight), tuple(places), len(source.edges)), found


def _separable(stride: int, ops: list[str], kernel: str, xs: list[Array], weights: Tree, which: str):
    """A depthwise and a pointwise layer of each operation: xs [C, H, W, N] or one a row -> (z [rows, ...], moments)."""
    of = [(weights[op][f"depthwise{which}"], weights[op][f"pointwise{which}"]) for op in ops]
    dilation = 2 if ops[0].startswith("dil") else 1
    axes = [None if x.ndim == 4 else 0 for x in xs]
    if kernel != "plain":
        run = partial(operations.separable, kernel, stride=stride, dilation=dilation)
        return jax.vmap(run, (axes[0], 0, 0))(xs[0], *of[0])
    middle = [
        jax.vmap(partial(layers.depthwise, stride=stride, dilation=dilation), (axis, 0))(x, depthwise)
        for x, axis, (depthwise, _) in zip(xs, axes, of, strict=True)
    ]
    pointwise = jnp.concatenate([weight for _, weight in of])
    return jax.vmap(layers.pointwise)(layers.settled(jnp.concatenate(middle)), pointwise), None
