"""One DARTS cell (Liu et al., ICLR 2019): a scan over its sources and, inside it, over the edges that leave them.

An unrolled supernet (1,395 convolutions) takes XLA seven minutes to compile, so the sources of a cell and
the edges of a source are stacked and one compiled body serves them all. A source computes its ReLU and the
operations without weights once; only convolutions are done edge by edge.

The gradient of that scan is written by hand. Automatic differentiation would keep a copy of the nodes for
every step. This one keeps the nodes once and computes each edge again on the way back.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedmetanas_jax.core import Array, Tree
from fedmetanas_jax.models import operations
from fedmetanas_jax.models.plan import CellPlan, num_nodes, stack_rows
from fedmetanas_jax.models.sources import in_edge_order
from fedmetanas_jax.models.stages import Given, Stage, by_edge, lay_out, no_nodes, stages


def scanned_cell(
    inputs: Array, weights: Tree, stats: Tree, mix: Array, plan: CellPlan, reduce: bool, train: bool
) -> tuple[Array, Tree]:
    """One cell: inputs [2, C, H, W, N] (preprocessed) -> ([nodes, C, H', W', N], moments of its batch norms).

    weights, stats and moments: {op: {name: leaves [edges of its stack, ...]}}; no moments are found in evaluation.
    mix [edges, ops].
    """
    nodes, rows = num_nodes(plan), stack_rows(plan, reduce)
    state, found = no_nodes(inputs, nodes, reduce), []
    for stage in stages(plan, reduce):
        source = inputs if stage.stride == 2 else None
        given = lay_out(stage, rows, weights, stats, mix, train)
        state, moments = run_stage(stage, train, source, state, given)
        found += by_edge(stage, *moments)
    return state[-nodes:], in_edge_order(found)


def run_stage(
    stage: Stage, train: bool, source: Array | None, nodes: Array, given: Given
) -> tuple[Array, Tree]:
    """Adds to `nodes` [rows, C, H', W', N] what the edges of the stage contribute.

    source [inputs, C, H, W, N], or None where the sources are rows of `nodes` themselves. Returns
    (nodes, (moments of the operations without weights [sources, C], of the others [sources, slots, C])).
    """
    leave, back = leaving(stage, train)

    def steps(given: Given) -> tuple:
        of_plan = Step(stage.reaches.any(1), stage.end, stage.alive)
        return stage.start, of_plan, given

    @jax.custom_vjp
    def run(source, nodes, given):
        def visit(nodes, step):
            start, *step = step
            return leave(nodes, (nodes if source is None else source)[start], *step)

        return lax.scan(visit, nodes, steps(given))

    def forward(source, nodes, given):
        out = run(source, nodes, given)
        return out, (source, out[0], given)

    def backward(saved, cotangents):
        source, nodes, given = saved

        def visit(grads, step):
            g_nodes, g_source = grads
            start, *step = step
            g_x, g_given = back(g_nodes, (nodes if source is None else source)[start], *step)
            if source is None:
                return (g_nodes.at[start].add(g_x), None), g_given
            return (g_nodes, g_source.at[start].add(g_x)), g_given

        # Sources backwards: a node's gradient is complete before the edges that end in it are visited. The moments
        # feed running averages alone, which no gradient passes.
        grads = cotangents[0], None if source is None else jnp.zeros_like(source)
        (g_nodes, g_source), g_given = lax.scan(visit, grads, steps(given), reverse=True)
        return g_source, g_nodes, g_given

    run.defvjp(forward, backward)
    return run(source, nodes, given)


class Step(NamedTuple):
    """What the plan says of a source, leading with [sources] where it stands for all of a stage."""

    offers: Array  # [ops] bool: some edge that leaves it carries the operation
    ends: Array  # [slots] the rows of the nodes that its edges end in
    alive: Array  # [slots, ops] bool: the edge exists and carries the operation


def leaving(stage: Stage, train: bool) -> tuple[Callable, Callable]:
    """A step of a stage's scan, and its gradient.

    leave(nodes [rows, C, H', W', N], x, step, given) -> (nodes with what leaves the one source x [C, H, W, N] added,
    moments). back(gradient of those nodes, x, step, given) -> gradients of x and `given`.
    """
    full = bool((stage.slot >= 0).all())

    @partial(jax.checkpoint, prevent_cse=False)
    def edge(relu_x, alive, given):
        """What one edge gives by operations with weights: [C, H', W', N], zeros for an empty slot; their moments."""

        def run(relu_x, weights, mix, stats):
            stats = None if train else stats
            shares = [mix[op.number] for op in stage.own]
            return operations.weighted(stage.own, stage.stride, relu_x, weights, stats, shares, alive)

        return operations.where_alive(full, jnp.any(alive), run, relu_x, *given)

    def leave(nodes, x, step, given):
        moments = [{}, {}]
        if stage.shared:
            stats = None if train else given.shared_stats
            mix = given.shared_mix[:, np.array([op.number for op in stage.shared])]
            y, moments[0] = operations.weightless(stage.shared, stage.stride, x, stats, mix, step.offers)
            nodes = nodes.at[stage.first :].add(y)
        relu_x = lax.optimization_barrier(jax.nn.relu(x))

        def send(nodes, slot):
            end, alive, *given = slot
            y, moments = edge(relu_x, alive, given)
            return nodes.at[end].add(y), moments

        if stage.own:
            slots = step.ends, step.alive, given.weights, given.mix, given.stats
            nodes, moments[1] = lax.scan(send, nodes, slots)
        return nodes, tuple(moments)

    def back(g_nodes, x, step, given):
        nodes = g_nodes  # whatever is added to, the gradients are the same
        return jax.vjp(lambda x, given: leave(nodes, x, step, given), x, given, has_aux=True)[1](g_nodes)

    return leave, back
