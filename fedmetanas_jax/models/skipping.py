"""What a source of `scan` adds to the nodes, of the operations alone that the mix does not make 0.

A conditional that leaves out an operation writes zeros in its place, and again for each of its gradients: with nothing
alive, a step of the supernet of `cifar10_small` took a third of the time that it takes with everything. Here every
operation is a loop over the edges on which it is alive, and one that is on none costs nothing. How often a loop runs is
known at run time alone, so that automatic differentiation has no way back through it: the gradient is written by hand,
and has none of its own.

For clients computed one after another. Under `vmap` a loop runs for each as often as for any.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedmetanas_jax.core import Array, Tree
from fedmetanas_jax.models import operations
from fedmetanas_jax.models.operations import Op
from fedmetanas_jax.models.plan import OPS
from fedmetanas_jax.models.stages import Given, Stage

ALL = np.ones(len(OPS), bool)


class Step(NamedTuple):
    """What is alive of a source, leading with [sources] where it stands for all of a stage."""

    offers: Array  # [ops] int32, 1 or 0: whether any edge that leaves it carries the operation
    ends: Array  # [slots] the rows of the nodes that its edges end in
    slots: Array  # [slots, ops] the slots that carry the operation, then the others
    counts: Array  # [ops] int32: how many carry it


def steps(stage: Stage, given: Given) -> Step:
    """What is alive of every source of the stage."""
    offers = stage.reaches & (given.shared_mix != 0)
    alive = stage.alive & (given.mix != 0)
    slots = jnp.argsort(~alive, axis=1, stable=True)
    return Step(jnp.any(offers, 1).astype(jnp.int32), stage.end, slots, jnp.sum(alive, 1, dtype=jnp.int32))


def leaving(stage: Stage, train: bool) -> tuple[Callable, Callable]:
    """As `scan.leaving`."""

    def shared(op: Op, x: Array, mix: Array, stats: Tree) -> tuple[Array, Tree]:
        """What the source adds to all nodes by an operation without weights, and its moments."""
        alone = (Op(op.number, True),)
        return operations.weightless(alone, stage.stride, x, None if train else stats, mix, ALL)

    def own(op: Op, relu_x: Array, weights: Tree, stats: Tree, mix: Array) -> tuple[Array, Tree]:
        """What one edge adds to its node by an operation with weights, and its moments."""
        alone, weights, stats = (Op(op.number, True),), {op.name: weights}, None if train else {op.name: stats}
        return operations.weighted(alone, stage.stride, relu_x, weights, stats, mix, ALL)

    def rows(op: Op, given: Given) -> tuple:
        """What `own` reads, leaves [slots, ...]."""
        return given.weights[op.name], given.stats.get(op.name, {}), given.mix

    def leave(nodes: Array, x: Array, step: Step, given: Given):
        moments: list[dict] = [{}, {}]
        of_source = x, given.shared_mix, given.shared_stats
        for op in stage.shared:

            def add_shared(_, fixed, state, op=op):
                y, found = shared(op, *fixed)
                return state[0].at[stage.first :].add(y), found

            state = nodes, _nothing((), shared, op, *of_source)
            nodes, found = _each(step.offers[op.number], add_shared, of_source, state)
            moments[0] |= found
        relu_x = _relu(x)
        for op in stage.own:

            def add_own(n, fixed, state, op=op):
                slot = step.slots[n, op.number]
                y, found = own(op, fixed, *_at(slot, rows(op, given)))
                nodes, moments = state
                return nodes.at[step.ends[slot]].add(y), _put(moments, slot, found)

            state = nodes, _nothing(step.ends.shape, own, op, relu_x, *_at(0, rows(op, given)))
            nodes, found = _each(step.counts[op.number], add_own, relu_x, state)
            moments[1] |= found
        return nodes, tuple(moments)

    def back(g_nodes: Array, x: Array, step: Step, given: Given) -> tuple[Array, Given]:
        grads = jax.tree.map(jnp.zeros_like, given)
        of_source = x, given.shared_mix, given.shared_stats
        state = jnp.zeros_like(x), grads.shared_mix, grads.shared_stats
        for op in stage.shared:

            def add_shared(_, fixed, state, op=op):
                pull = jax.vjp(lambda *given: shared(op, *given), *fixed[0], has_aux=True)[1]
                return jax.tree.map(jnp.add, state, pull(fixed[1][stage.first :]))

            state = _each(step.offers[op.number], add_shared, (of_source, g_nodes), state)
        g_x, shared_mix, shared_stats = state
        shared_mix = jnp.where(given.shared_mix != 0, shared_mix, 0)  # all nodes' was found for any that takes it
        relu_x, through_relu = jax.vjp(_relu, x)
        g_relu_x, weights, stats, mix = jnp.zeros_like(x), {}, {}, grads.mix
        for op in stage.own:

            def add_own(n, fixed, state, op=op):
                slot = step.slots[n, op.number]
                here = _at(slot, rows(op, given))
                pull = jax.vjp(lambda *given: own(op, *given), fixed[0], *here, has_aux=True)[1]
                g, *g_here = pull(fixed[1][step.ends[slot]])
                so_far = _at(slot, state[1])
                return state[0] + g, _put(state[1], slot, jax.tree.map(jnp.add, so_far, tuple(g_here)))

            state = g_relu_x, rows(op, grads._replace(mix=mix))
            state = _each(step.counts[op.number], add_own, (relu_x, g_nodes), state)
            g_relu_x, (weights[op.name], of_stats, mix) = state
            stats |= {op.name: of_stats} if op.name in given.stats else {}
        found = {"shared_mix": shared_mix, "mix": mix, "weights": weights, "shared_stats": shared_stats, "stats": stats}
        return g_x + through_relu(g_relu_x)[0], Given(**found)

    return leave, back


def _each(count: Array, visit: Callable, fixed: Tree, state: Tree) -> Tree:
    """visit(n, fixed, state) -> state, for n below `count` [].

    XLA would compute before the loop, count or no count, what in it depends on no n: behind the barrier all does.
    """

    def body(n, state):
        return visit(*lax.optimization_barrier((n, fixed)), state)

    return lax.fori_loop(0, count, body, state)


def _at(slot: Array | int, rows: Tree) -> Tree:
    return jax.tree.map(lambda x: x[slot], rows)


def _put(rows: Tree, slot: Array, row: Tree) -> Tree:
    return jax.tree.map(lambda all_of, one: all_of.at[slot].set(one), rows, row)


def _nothing(rows: tuple[int, ...], function: Callable, op: Op, *arguments) -> Tree:
    """Zeros for the moments that the function finds, [*rows, ...]."""
    found = jax.eval_shape(lambda *given: function(op, *given)[1], *arguments)
    return jax.tree.map(lambda m: jnp.zeros((*rows, *m.shape), m.dtype), found)


def _relu(x: Array) -> Array:
    return lax.optimization_barrier(jax.nn.relu(x))
