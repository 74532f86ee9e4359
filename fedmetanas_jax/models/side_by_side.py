"""One DARTS cell with what is alike side by side: few large kernels, for devices that launch each on its own.

`scan` loops over the edges of a cell, which a CPU likes and a GPU does not: it launches the kernels of every edge
anew and may have to ask the host about every conditional. Here a cell is written out source by source. The edges
that leave a source, and the operations of a family on them, are rows of one array: one matrix product serves their
pointwise layers, one reduction their batch norms. Same numbers as `scan` up to rounding; docs/formulations.md says
what either costs. For a CPU, whose caches a row fills, every row is computed `apart`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedmetanas_jax import tree
from fedmetanas_jax.core import Array, Tree
from fedmetanas_jax.models import batchnorm, layers, operations
from fedmetanas_jax.models.operations import Op
from fedmetanas_jax.models.plan import OPS, CellPlan, carried, darts_graph, num_nodes, op_shapes, stacked
from fedmetanas_jax.models.sources import Source, sources, visit_all

# Operations whose layers can be rows of one array: as many layers, over images of one size.
FAMILIES = (("sep_conv_3x3", "sep_conv_5x5"), ("dil_conv_3x3", "dil_conv_5x5"), ("skip_connect",))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def summed(x: Array, places: tuple[int, ...], count: int) -> Array:
    """Sums of the rows x [n, ...] that have the same place: [count, ...]; its gradient, too, is a selection."""
    rows = [[x[n] for n, place in enumerate(places) if place == p] for p in range(count)]
    return jnp.stack([sum(found[1:], found[0]) if found else jnp.zeros_like(x[0]) for found in rows])


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def of_one(x: Array, kernels: Array, stride: int, dilation: int) -> Array:
    """Depthwise layers of one source: x [C, H, W, N], kernels [rows, C, k, k] -> [rows, C, H/stride, W/stride, N].

    Every row's share in the gradient of x is an array of its own before they are added. XLA:GPU would merge their taps,
    over a hundred, into one kernel, which took 16 ms on an H200 where the layers themselves take 0.1 ms.
    """
    return _of_one_forward(x, kernels, stride, dilation)[0]


def _of_one_forward(x, kernels, stride, dilation):
    run = partial(layers.depthwise_forward, stride=stride, dilation=dilation)
    return jax.vmap(run, (None, 0), (0, (None, 0)))(x, kernels)


def _of_one_backward(stride, dilation, saved, g):
    dx, dk = jax.vmap(partial(layers.depthwise_backward, stride, dilation), ((None, 0), 0))(saved, g)
    return jnp.sum(lax.optimization_barrier(dx), axis=0), dk


of_one.defvjp(_of_one_forward, _of_one_backward)
summed.defvjp(lambda x, *static: (summed(x, *static), None), lambda places, _, __, g: (g[np.array(places)],))


def unrolled_cell(
    inputs: Array, weights: Tree, stats: Tree, mix: Array, plan: CellPlan, reduce: bool, train: bool,
    apart: bool = False,
) -> tuple[Array, Tree]:  # fmt: skip
    """As `scan.scanned_cell`: inputs [2, C, H, W, N] -> ([nodes, C, H', W', N], moments of its batch norms).

    apart: operations with weights are computed edge by edge, not those of a family as rows of one array.
    """
    stride, nodes = (lambda i: 2 if reduce and i < 2 else 1), num_nodes(plan)
    found = sources(darts_graph(nodes), plan, lambda op, i: bool(op_shapes(op, 2, stride(i))))
    height, width = (n // 2 if reduce else n for n in inputs.shape[2:4])
    empty = jnp.zeros((inputs.shape[1], height, width, inputs.shape[4]), inputs.dtype)
    out, moments = visit_all(
        found, stacked(plan, reduce), lambda source, *given: _visit(source, stride(source.number), apart, *given),
        list(inputs), [empty] * nodes, weights, stats, jnp.where(carried(plan), mix, 0), train,
    )  # fmt: skip
    return jnp.stack(out), moments


def _visit(
    source: Source, stride: int, apart: bool, x: Array, weights: Tree, known: Tree | None, mix: Array
) -> tuple[Array, Tree]:
    """As `sources.visit_all` has it."""
    total, moments = 0.0, {}
    if source.shared:
        ops = tuple(Op(OPS.index(op), True) for op in source.shared)
        shares = mix[:, np.array([op.number for op in ops])]
        total, seen = operations.weightless(ops, stride, x, known, shares, np.ones(len(OPS), bool))
        for op, found in seen.items():
            count = len(source.on[op])
            moments[op] = jax.tree.map(lambda m, count=count: jnp.broadcast_to(m, (count, *m.shape)), found)
    relu_x = lax.optimization_barrier(jax.nn.relu(x))
    if apart and source.own:
        y, seen = _apart(source, stride, relu_x, weights, known, mix)
        return total + y, moments | seen
    for family in FAMILIES:
        ops = [op for op in family if op in source.own]
        if ops:
            y, seen = _family(source, stride, ops, relu_x, weights, known, mix)
            total, moments = total + y, moments | seen
    return total, moments


def _apart(source: Source, stride: int, relu_x: Array, weights: Tree, known: Tree | None, mix: Array):
    """What operations with weights add, one edge after another, and the moments they found."""
    rows, found = [], {op: [] for op in source.own}
    for n in range(len(source.edges)):
        here = {op: source.on[op].index(n) for op in source.own if n in source.on[op]}
        own, given = (part and {op: tree.take(part[op], row) for op, row in here.items()} for part in (weights, known))
        ops = tuple(Op(OPS.index(op), True) for op in here)
        shares = [mix[n][op.number] for op in ops]
        y, seen = operations.weighted(ops, stride, relu_x, own, given, shares, np.ones(len(OPS), bool))
        rows.append(y)
        for op in here:
            found[op].append(seen[op])
    nothing = jnp.zeros_like(next(y for y in rows if y is not None))
    return (
        jnp.stack([nothing if y is None else y for y in rows]),
        {op: jax.tree.map(lambda *m: jnp.stack(m), *moments) for op, moments in found.items()},
    )


def _family(source: Source, first_stride: int, ops: list[str], relu_x: Array, weights: Tree, known: Tree | None, mix):
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
        dilation = 2 if ops[0].startswith("dil") else 1

        def depthwise(x, kernels):
            if x.ndim == 4:
                return of_one(x, kernels, stride, dilation)
            return jax.vmap(partial(layers.depthwise, stride=stride, dilation=dilation))(x, kernels)

        middle = [depthwise(x, weights[op][f"depthwise{which}"]) for x, op in zip(xs, ops, strict=True)]
        pointwise = jnp.concatenate([weights[op][f"pointwise{which}"] for op in ops])
        return jax.vmap(layers.pointwise)(layers.settled(jnp.concatenate(middle)), pointwise)

    last = "norm"
    if ops == ["skip_connect"]:
        halved = jax.vmap(operations.factorized_reduce, (None, 0, 0))
        z = halved(relu_x, weights[ops[0]]["even"], weights[ops[0]]["odd"])
    else:
        z = separable("", first_stride, [relu_x] * len(ops))
        if ops[0].startswith("sep"):
            z, last = separable("_2", 1, jnp.split(jax.nn.relu(norm("norm", z)), ends)), "norm_2"
    return summed(norm(last, z, weight), tuple(places), len(source.edges)), found
