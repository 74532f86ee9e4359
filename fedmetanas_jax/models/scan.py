"""One DARTS cell (Liu et al., ICLR 2019): a scan over its sources and, inside it, over the edges that leave them.

An unrolled supernet (1,395 convolutions) takes XLA seven minutes to compile, so the sources of a cell and
the edges of a source are stacked and one compiled body serves them all. A source computes its ReLU and the
operations without weights once; only convolutions are done edge by edge.

The gradient of that scan is written by hand. Automatic differentiation would keep a copy of the nodes for
every step. This one keeps the nodes once and computes each edge again on the way back.
"""

import jax
import jax.numpy as jnp
from jax import lax

from fedmetanas_jax.core import Array, Tree
from fedmetanas_jax.models import operations
from fedmetanas_jax.models.plan import CellPlan, num_nodes, stack_rows
from fedmetanas_jax.models.stages import Given, Stage, by_edge, lay_out, stages


def scanned_cell(
    inputs: Array, weights: Tree, stats: Tree, mix: Array, plan: CellPlan, reduce: bool, train: bool
) -> tuple[Array, Tree]:
    """One cell: inputs [2, C, H, W, N] (preprocessed) -> ([nodes, C, H', W', N], moments of its batch norms).

    weights, stats and moments: {op: {name: leaves [edges of its stack, ...]}}; no moments are found in evaluation.
    mix [edges, ops].
    """
    nodes, rows = num_nodes(plan), stack_rows(plan, reduce)
    channels, height, width, batch = inputs.shape[1:]
    shape = (nodes, channels, height // 2, width // 2, batch) if reduce else (nodes, *inputs.shape[1:])
    state = jnp.zeros(shape, inputs.dtype)
    if not reduce:
        state = jnp.concatenate([inputs, state])
    found = []
    for stage in stages(plan, reduce):
        source = inputs if stage.stride == 2 else None
        given = lay_out(stage, rows, weights, stats, mix, train)
        state, moments = run_stage(stage, train, source, state, given)
        found += by_edge(stage, *moments)
    return state[-nodes:], operations.in_edge_order(found)


def run_stage(stage: Stage, train: bool, source: Array | None, nodes: Array, given: Given) -> tuple[Array, Tree]:
    """Adds to `nodes` [rows, C, H', W', N] what the edges of the stage contribute.

    source [inputs, C, H, W, N], or None where the sources are rows of `nodes` themselves. Returns
    (nodes, (moments of the operations without weights [sources, C], of the others [sources, slots, C])).
    """
    full = bool((stage.slot >= 0).all())
    steps = stage.start, stage.reaches.any(1), stage.end, stage.alive

    def shared(x, mix, stats, offers):
        """What a source gives by operations without weights: [nodes, C, H', W', N] and their moments."""
        return operations.weightless(stage.shared, stage.stride, x, None if train else stats, mix, offers)

    def own(relu_x, weights, mix, stats, alive):
        """What one edge gives by operations with weights: [C, H', W', N], zeros for an empty slot; their moments."""

        def run(relu_x, weights, mix):
            stats_or_none = None if train else stats
            return operations.weighted(stage.own, stage.stride, relu_x, weights, stats_or_none, mix, alive)

        return operations.where_alive(full, jnp.any(alive), run, relu_x, weights, mix)

    @jax.custom_vjp
    def run(source, nodes, given):
        def visit(nodes, step):
            start, offers, ends, alive, given = step
            x = (nodes if source is None else source)[start]
            moments = [{}, {}]
            if stage.shared:
                y, moments[0] = shared(x, given.shared_mix, given.shared_stats, offers)
                nodes = nodes.at[stage.first :].add(y)
            relu_x = lax.optimization_barrier(jax.nn.relu(x))

            def send(nodes, slot):
                end, alive, weights, mix, stats = slot
                y, moments = own(relu_x, weights, mix, stats, alive)
                return nodes.at[end].add(y), moments

            if stage.own:
                nodes, moments[1] = lax.scan(send, nodes, (ends, alive, given.weights, given.mix, given.stats))
            return nodes, tuple(moments)

        return lax.scan(visit, nodes, (*steps, given))

    def forward(source, nodes, given):
        out = run(source, nodes, given)
        return out, (source, out[0], given)

    def backward(saved, cotangents):
        source, nodes, given = saved
        # The moments feed running averages alone, which no gradient passes.
        grads = cotangents[0], None if source is None else jnp.zeros_like(source)

        def visit(grads, step):
            start, offers, ends, alive, given = step
            g_nodes, g_source = grads
            x = (nodes if source is None else source)[start]
            g_x, g_shared_mix, g_own = jnp.zeros_like(x), jnp.zeros_like(given.shared_mix), None
            if stage.shared:
                again = lambda x, mix: shared(x, mix, given.shared_stats, offers)  # noqa: E731
                g_x, g_shared_mix = _pulled(again, g_nodes[stage.first :], x, given.shared_mix)
            relu_x = lax.optimization_barrier(jax.nn.relu(x))

            def send(g_relu, slot):
                end, alive, weights, mix, stats = slot
                again = lambda *trained: own(*trained, stats, alive)  # noqa: E731
                g, *g_own = _pulled(again, g_nodes[end], relu_x, weights, mix)
                return g_relu + g, g_own

            if stage.own:
                slots = ends, alive, given.weights, given.mix, given.stats
                g_relu, g_own = lax.scan(send, jnp.zeros_like(x), slots, reverse=True)
                g_x = g_x + jnp.where(x > 0, g_relu, 0)
            g_weights, g_mix = g_own or (given.weights, jnp.zeros_like(given.mix))
            if source is None:
                g_nodes = g_nodes.at[start].add(g_x)
            else:
                g_source = g_source.at[start].add(g_x)
            return (g_nodes, g_source), (g_shared_mix, g_mix, g_weights)

        # Sources backwards: a node's gradient is complete before the edges that end in it are visited.
        (g_nodes, g_source), g_given = lax.scan(visit, grads, (*steps, given), reverse=True)
        no_stats = jax.tree.map(jnp.zeros_like, (given.shared_stats, given.stats))
        return g_source, g_nodes, Given(*g_given, *no_stats)

    run.defvjp(forward, backward)
    return run(source, nodes, given)


def _pulled(function, g: Array, *arguments) -> tuple:
    """Gradients by the arguments of function(*arguments) -> (y, moments), where y's is g."""
    return jax.vjp(function, *arguments, has_aux=True)[1](g)
