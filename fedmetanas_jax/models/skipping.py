"""A DARTS cell as `scan` computes it, of the operations alone that the mix does not make 0.

A conditional that leaves out an operation writes zeros in its place, and again for each of its gradients: with nothing
alive, a step of the supernet of `cifar10_small` took a third of the time that it takes with everything. Here every
operation is a loop over the edges on which it is alive, and one that is on none costs nothing. How often a loop runs is
known at run time alone, so that automatic differentiation has no way back through it: the gradient is written by hand,
and has none of its own.

What an edge has of its own is read and written at its row of the stack where the edge is computed. Laying it out by
source and slot before, and its gradients and moments back after, is a copy each way and programs of its own for every
shape there is (docs/formulations.md).

For clients computed one after another. Under `vmap` a loop runs for each as often as for any.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import tree_leaves_with_path

from fedmetanas_jax import tree
from fedmetanas_jax.core import Array, Tree
from fedmetanas_jax.models import batchnorm, operations
from fedmetanas_jax.models.alive import Mixes, Step, add, add_from, at, mixes_of, put, steps
from fedmetanas_jax.models.operations import Op
from fedmetanas_jax.models.plan import (
    OPS,
    CellPlan,
    norm_names,
    num_nodes,
    op_shapes,
    stack_rows,
    stack_stride,
    stacked,
)
from fedmetanas_jax.models.stages import Stage, no_nodes, stages

ALL = np.ones(len(OPS), bool)


def skipping_cell(
    inputs: Array, weights: Tree, stats: Tree, mix: Array, plan: CellPlan, reduce: bool, train: bool
) -> tuple[Array, Tree]:
    """As `scan.scanned_cell`. The moments of what the mix makes 0 are 0, and so is its mix's gradient."""
    cell, rows, nodes = stages(plan, reduce), stack_rows(plan, reduce), num_nodes(plan)

    def run(inputs: Array, weights: Tree, stats: Tree, mixes: list[Mixes]):
        state, moments = no_nodes(inputs, nodes, reduce), _no_moments(inputs, stats, plan, reduce, train)
        of_sources = []
        for stage, here in zip(cell, mixes, strict=True):
            leave, source = leaving(stage, train)[0], inputs if stage.stride == 2 else None

            def visit(carry, step, leave=leave, source=source):
                x = at(step.start, carry[0] if source is None else source)
                return leave(*carry, x, step, weights, stats)

            (state, moments), found = lax.scan(visit, (state, moments), steps(stage, rows, here))
            of_sources.append(found)
        return state, moments | _of_edges(cell, rows, of_sources)

    def forward(*given):
        out = run(*given)
        return out, (out[0], *given)

    def backward(saved, cotangents):
        state, inputs, weights, stats, mixes = saved
        # The moments feed running averages alone, which no gradient passes.
        g_state, g_inputs = cotangents[0], jnp.zeros_like(inputs)
        sums, g_mixes = Sums(*tree.zeros_like((weights, {} if train else stats))), []
        for stage, here in reversed([*zip(cell, mixes, strict=True)]):
            back, halves = leaving(stage, train)[1], stage.stride == 2

            def visit(carry, step, back=back, halves=halves):
                g_state, g_inputs, sums = carry
                x = at(step.start, inputs if halves else state)
                g_x, sums, g_mix = back(g_state, sums, x, step, weights, stats)
                if halves:
                    return (g_state, add(g_inputs, step.start, g_x), sums), g_mix
                return (add(g_state, step.start, g_x), g_inputs, sums), g_mix

            # Sources backwards: a node's gradient is complete before the edges that end in it are visited.
            carry = g_state, g_inputs, sums
            (g_state, g_inputs, sums), g_mix = lax.scan(visit, carry, steps(stage, rows, here), reverse=True)
            g_mixes.insert(0, g_mix)
        g_stats = tree.zeros_like(stats) if train else sums.stats
        return g_inputs if reduce else g_state[:2], sums.weights, g_stats, g_mixes

    cell_of = jax.custom_vjp(run)
    cell_of.defvjp(forward, backward)
    state, moments = cell_of(inputs, weights, stats, [mixes_of(stage, mix) for stage in cell])
    return state[-nodes:], moments


def _no_moments(inputs: Array, stats: Tree, plan: CellPlan, reduce: bool, train: bool) -> Tree:
    """{op: {norm: {"mean", "var"}}}, zeros [edges, C] of what operations with weights find; {} where nothing is."""
    either = any(path[-1].key == batchnorm.EITHER for path, _ in tree_leaves_with_path(stats))
    if not (train or either):
        return {}
    dtype, found = batchnorm.wide(inputs[:0]).dtype, {}
    for op, edges in stacked(plan, reduce).items():
        own = edges and op_shapes(op, inputs.shape[1], stack_stride(op))
        names = norm_names(op, stack_stride(op)) if own else ()
        zeros = jnp.zeros((len(edges), inputs.shape[1]), dtype)
        found |= {op: {name: {"mean": zeros, "var": zeros} for name in names}} if names else {}
    return found


def _of_edges(cell: list[Stage], rows: dict[str, np.ndarray], of_sources: list[Tree]) -> Tree:
    """The moments that stages found [sources, C] by operations without weights, {op: {norm: moments [edges, C]}}.

    Not written by row where they are found, as others are: XLA:CPU would round those of the maximum otherwise.
    """
    found = {}
    for op in sorted({op for moments in of_sources for op in moments}):
        parts, sources = [], []
        for stage, moments in zip(cell, of_sources, strict=True):
            if op in moments:
                source, node = np.nonzero(stage.reaches[..., OPS.index(op)])
                sources += [*zip(rows[op][stage.out[source, node]], source + sum(map(len, parts)), strict=True)]
                parts.append(np.arange(len(stage.start)))
        joined = jax.tree.map(lambda *m: jnp.concatenate(m), *[moments[op] for moments in of_sources if op in moments])
        found[op] = tree.take(joined, np.array([source for _, source in sorted(sources)]))
    return found


class Sums(NamedTuple):
    """Gradients of a cell's stacks, as far as its edges were visited."""

    weights: Tree
    stats: Tree  # {} in training, which does not read them


def leaving(stage: Stage, train: bool) -> tuple[Callable, Callable]:
    """What a source adds, and its gradient.

    leave(nodes [rows, C, H', W', N], moments, x, step, weights, stats) -> ((nodes with what leaves the one source x
    [C, H, W, N] added, moments with those of its edges), moments [C] of the operations without weights).
    back(gradient of those nodes, Sums, x, step, weights, stats) -> (gradient of x, Sums with those of its edges, the
    gradient of its Mixes).
    """

    def shared(op: Op, x: Array, mix: Array, stats: Tree) -> tuple[Array, Tree]:
        """What the source adds to all nodes by an operation without weights, and its moments."""
        given = None if train else {op.name: stats}
        y, found = operations.weightless((Op(op.number, True),), stage.stride, x, given, mix[:, None], ALL)
        return y, found[op.name]

    def own(op: Op, relu_x: Array, weights: Tree, stats: Tree, share: Array) -> tuple[Array, Tree]:
        """What one edge adds to its node by an operation with weights, and its moments."""
        given = {op.name: weights}, None if train else {op.name: stats}
        y, found = operations.weighted((Op(op.number, True),), stage.stride, relu_x, *given, [share], ALL)
        return y, found[op.name]

    def of_source(op: Op, x: Array, step: Step, stats: Tree) -> tuple[Array, Array, Tree]:
        """What `shared` reads."""
        given = {} if train or op.name not in step.out else tree.take(stats[op.name], step.out[op.name])
        return x, step.mix.shared[op.name], given

    def of_edge(op: Op, n: Array, step: Step, weights: Tree, stats: Tree) -> tuple[Array, Array, tuple]:
        """(slot, row, what `own` reads) of the n-th edge on which the operation is alive."""
        slot = at(n, step.slots[op.name])
        row = at(slot, step.rows[op.name])
        given = {} if train else stats[op.name]
        return slot, row, (at(row, weights[op.name]), at(row, given), at(slot, step.mix.own[op.name]))

    def leave(nodes: Array, moments: Tree, x: Array, step: Step, weights: Tree, stats: Tree):
        of_source_alone = {}
        for op in stage.shared:
            given = of_source(op, x, step, stats)

            def add_shared(_, fixed, state, op=op):
                y, found = shared(op, *fixed)
                return add_from(stage.first, state[0], y), found

            here = jax.tree.map(jnp.zeros_like, jax.eval_shape(lambda *given, op=op: shared(op, *given)[1], *given))
            nodes, here = _each(step.offers[op.name], add_shared, given, (nodes, here))
            of_source_alone |= {op.name: here} if jax.tree.leaves(here) else {}
        relu_x = _relu(x)
        for op in stage.own:
            here = moments.get(op.name, {})

            def add_own(n, relu_x, state, op=op):
                slot, row, given = of_edge(op, n, step, weights, stats)
                y, found = own(op, relu_x, *given)
                nodes, here = state
                return add(nodes, at(slot, step.ends), y), put(here, row, found) if here else here

            nodes, here = _each(step.counts[op.name], add_own, relu_x, (nodes, here))
            moments = moments | ({op.name: here} if here else {})
        return (nodes, moments), of_source_alone

    def back(g_nodes: Array, sums: Sums, x: Array, step: Step, weights: Tree, stats: Tree):
        g_weights, g_stats = sums
        g_x, g_mix = tree.zeros_like((x, step.mix))
        for op in stage.shared:
            here = g_stats[op.name] if g_stats and op.name in step.out else {}

            def add_shared(_, fixed, state, op=op):
                pull = jax.vjp(lambda *given: shared(op, *given), *fixed[0], has_aux=True)[1]
                g_x, g_shared, g_given = pull(fixed[1][stage.first :])
                here = jax.tree.map(lambda x, g: x.at[step.out[op.name]].add(g), state[2], g_given)
                return state[0] + g_x, state[1] + g_shared, here

            fixed = of_source(op, x, step, stats), g_nodes
            state = g_x, g_mix.shared[op.name], here
            g_x, found, here = _each(step.offers[op.name], add_shared, fixed, state)
            g_mix.shared[op.name] = jnp.where(step.mix.shared[op.name] != 0, found, 0)  # was found for all nodes
            g_stats = g_stats | ({op.name: here} if here else {})
        relu_x, through_relu = jax.vjp(_relu, x)
        g_relu_x = jnp.zeros_like(x)
        for op in stage.own:

            def add_own(n, fixed, state, op=op):
                slot, row, given = of_edge(op, n, step, weights, stats)
                pull = jax.vjp(lambda *given: own(op, *given), fixed[0], *given, has_aux=True)[1]
                g, *g_here, g_share = pull(at(at(slot, step.ends), fixed[1]))
                g_relu_x, here, g_own = state
                return g_relu_x + g, put(here, row, tuple(g_here)), put(g_own, slot, g_share)

            state = g_relu_x, (g_weights[op.name], g_stats.get(op.name, {})), g_mix.own[op.name]
            g_relu_x, here, g_mix.own[op.name] = _each(step.counts[op.name], add_own, (relu_x, g_nodes), state)
            g_weights = g_weights | {op.name: here[0]}
            g_stats = g_stats | ({op.name: here[1]} if g_stats else {})
        return g_x + through_relu(g_relu_x)[0], Sums(g_weights, g_stats), g_mix

    return leave, back


def _each(count: Array, visit: Callable, fixed: Tree, state: Tree) -> Tree:
    """visit(n, fixed, state) -> state, for n below `count` [].

    XLA would compute before the loop, count or no count, what in it depends on no n: behind the barrier all does.
    """

    def body(n, state):
        return visit(*lax.optimization_barrier((n, fixed)), state)

    return lax.fori_loop(jnp.uint32(0), count, body, state)


def _relu(x: Array) -> Array:
    return lax.optimization_barrier(jax.nn.relu(x))
