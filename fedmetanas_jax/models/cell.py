"""One DARTS cell (Liu et al., ICLR 2019): a scan over its sources and, inside it, over the edges that leave them.

An unrolled supernet (1,395 convolutions) takes XLA seven minutes to compile, so the sources of a cell and
the edges of a source are stacked and one compiled body serves them all. A source computes its ReLU and the
operations without weights once; only convolutions are done edge by edge.

The gradient of that scan is written by hand. Automatic differentiation would keep a copy of the nodes for
every step. This one keeps the nodes once and, with `remat`, computes each edge again on the way back;
without, it keeps what the gradients of the edges need.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fedmetanas_jax.core import Array, Tree
from fedmetanas_jax.models import operations, side_by_side
from fedmetanas_jax.models.layout import Given, by_edge, in_edge_order, lay_out
from fedmetanas_jax.models.operations import Keep
from fedmetanas_jax.models.schedule import Stage, stages, tabulate


class How(NamedTuple):
    """Ways to compute a cell; all give the same numbers up to rounding."""

    remat: bool = True  # compute edges (batched: sources) again in the backward pass instead of keeping what it needs
    batched: bool = False  # by `side_by_side` instead of the scan
    kernel: str = "plain"  # one of operations.KERNELS


def suited(backend: str, keep: Keep) -> How:
    """The way for a backend ("cpu", "gpu", "tpu") and the live operations of a cell (results/formulations.md).

    A CPU is fastest on small arrays one after another until an edge has at most one operation left; an
    accelerator wants few large kernels and no conditionals.
    """
    one_by_one = backend == "cpu" and any(len(ops) > 1 for ops in keep)
    return How(remat=one_by_one, batched=not one_by_one)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def run_stage(stage: Stage, train: bool, how: How, source: Array | None, nodes: Array, given: Given):
    """Adds to `nodes` [rows, C, H', W', N] what the edges of the stage contribute.

    source [inputs, C, H, W, N], or None where the sources are rows of `nodes` themselves. Returns
    (nodes, (moments of the operations without weights [sources, C], of the others [sources, slots, C])).
    """
    return _forward(stage, train, how, False, source, nodes, given)[0]


def _steps(stage: Stage, train: bool, how: How):
    """The two differentiable parts of a step.

    shared(x, mix, stats, offers) -> (y [nodes, C, H', W', N], moments): what a source gives by operations
    without weights. own(relu_x, weights, mix, stats, alive) -> (y [C, H', W', N], moments): what one edge
    gives by those with weights, zeros for an empty slot.
    """

    def shared(x, mix, stats, offers):
        return operations.weightless(stage.shared, stage.stride, x, None if train else stats, mix, offers)

    def own(relu_x, weights, mix, stats, alive):
        def run(relu_x, weights, mix):
            return operations.weighted(
                stage.own, stage.stride, relu_x, weights, None if train else stats, mix, alive, how.kernel
            )

        return operations.where_alive(stage.full, jnp.any(alive), run, relu_x, weights, mix)

    return shared, own


def _forward(stage, train, how, keep, source, nodes, given):
    """What `run_stage` returns and, with `keep`, the functions that pull gradients back through each step."""
    shared, own = _steps(stage, train, how)
    table = tabulate(stage)

    def evaluate(function, *arguments):
        if keep:
            return jax.vjp(function, *arguments, has_aux=True)
        y, moments = function(*arguments)
        return y, None, moments

    def visit(nodes, step):
        start, offers, ends, alive, given = step
        x = (nodes if source is None else source)[start]
        pulls, moments = [None, None], [{}, {}]
        if stage.shared:
            y, pulls[0], moments[0] = evaluate(
                lambda x, mix: shared(x, mix, given.shared_stats, offers), x, given.shared_mix
            )
            nodes = nodes.at[stage.first :].add(y)
        relu_x = lax.optimization_barrier(jax.nn.relu(x))

        def send(nodes, slot):
            end, alive, weights, mix, stats = slot
            y, pull, moments = evaluate(lambda *trained: own(*trained, stats, alive), relu_x, weights, mix)
            return nodes.at[end].add(y), (pull, moments)

        if stage.own:
            slots = ends, alive, given.weights, given.mix, given.stats
            nodes, (pulls[1], moments[1]) = lax.scan(send, nodes, slots)
        return nodes, (pulls, moments)

    nodes, (pulls, moments) = lax.scan(visit, nodes, (table.start, table.offers, table.end, table.alive, given))
    return (nodes, moments), pulls


def _run_stage_forward(stage, train, how, source, nodes, given):
    out, pulls = _forward(stage, train, how, not how.remat, source, nodes, given)
    return out, (source, out[0], given, pulls)


def _run_stage_backward(stage, train, how, saved, cotangents):
    source, nodes, given, pulls = saved
    shared, own = _steps(stage, train, how)
    table = tabulate(stage)
    # The moments feed running averages alone, which no gradient passes.
    grads = cotangents[0], None if source is None else jnp.zeros_like(source)

    def pulled(pull, g, function, *arguments):
        return (jax.vjp(function, *arguments, has_aux=True)[1] if how.remat else pull)(g)

    def visit(grads, step):
        start, offers, ends, alive, given, (shared_pull, own_pulls) = step
        g_nodes, g_source = grads
        x = (nodes if source is None else source)[start]
        g_x, g_shared_mix, g_own = jnp.zeros_like(x), jnp.zeros_like(given.shared_mix), None
        if stage.shared:
            g_x, g_shared_mix = pulled(
                shared_pull,
                g_nodes[stage.first :],
                lambda x, mix: shared(x, mix, given.shared_stats, offers)[:2],
                x,
                given.shared_mix,
            )
        relu_x = lax.optimization_barrier(jax.nn.relu(x))

        def send(g_relu, slot):
            end, alive, weights, mix, stats, pull = slot
            g, *g_own = pulled(pull, g_nodes[end], lambda *trained: own(*trained, stats, alive), relu_x, weights, mix)
            return g_relu + g, g_own

        if stage.own:
            slots = ends, alive, given.weights, given.mix, given.stats, own_pulls
            g_relu, g_own = lax.scan(send, jnp.zeros_like(x), slots, reverse=True)
            g_x = g_x + jnp.where(x > 0, g_relu, 0)
        g_weights, g_mix = g_own or (given.weights, jnp.zeros_like(given.mix))
        if source is None:
            g_nodes = g_nodes.at[start].add(g_x)
        else:
            g_source = g_source.at[start].add(g_x)
        return (g_nodes, g_source), (g_shared_mix, g_mix, g_weights)

    # Sources backwards: a node's gradient is complete before the edges that end in it are visited.
    steps = table.start, table.offers, table.end, table.alive, given, pulls
    (g_nodes, g_source), g_given = lax.scan(visit, grads, steps, reverse=True)
    no_stats = jax.tree.map(jnp.zeros_like, (given.shared_stats, given.stats))
    return g_source, g_nodes, Given(*g_given, *no_stats)


run_stage.defvjp(_run_stage_forward, _run_stage_backward)


def cell(
    inputs: Array, weights: Tree, stats: Tree, mix: Array, keep: Keep, nodes: int, reduce: bool, train: bool, how: How
) -> tuple[Array, Tree]:
    """One cell: inputs [2, C, H, W, N] (preprocessed) -> ([nodes, C, H', W', N], moments of its batch norms).

    weights and stats: {op: {name: [edges of its `stack`, ...]}}. mix [edges, ops].
    """
    if how.batched:
        return side_by_side.cell(inputs, weights, stats, mix, keep, nodes, reduce, train, how)
    channels, height, width, batch = inputs.shape[1:]
    shape = (nodes, channels, height // 2, width // 2, batch) if reduce else (nodes, *inputs.shape[1:])
    state = jnp.zeros(shape, inputs.dtype)
    if not reduce:
        state = jnp.concatenate([inputs, state])
    found: dict = {}
    for stage in stages(keep, nodes, reduce):
        source = inputs if stage.stride == 2 else None
        state, moments = run_stage(stage, train, how, source, state, lay_out(stage, weights, stats, mix, train))
        for op, part in by_edge(stage, moments).items():
            found.setdefault(op, []).append(part)
    return state[-nodes:], {op: in_edge_order(parts) for op, parts in found.items()}
