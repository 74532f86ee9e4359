"""One DARTS cell (methods: search space of Liu et al., ICLR 2019): a scan over its edges.

An unrolled supernet (1,395 convolutions) takes XLA seven minutes to compile, so the edges of a cell are
stacked and one compiled body serves them all; a node's tensor is complete before an edge reads it,
because edges are ordered by the node they end in.

The gradient of that scan is written by hand. Automatic differentiation would keep all intermediate values
of all edges; this one keeps the node tensors alone and computes each edge again on the way back (what
`jax.checkpoint` on the body would do, but without a copy of the nodes for every step of the scan).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedmetanas_jax.core import Array, Tree
from fedmetanas_jax.models import layers
from fedmetanas_jax.topology import OPS, edge_ends

KERNEL = {"sep_conv_3x3": 3, "sep_conv_5x5": 5, "dil_conv_3x3": 3, "dil_conv_5x5": 5}

Keep = tuple[tuple[int, ...], ...]  # of one cell type: the operations alive on each edge


def carriers(keep: Keep, op: int, edges: list[int]) -> list[int]:
    """Those of `edges` on which `op` is alive."""
    return [e for e in edges if op in keep[e]]


def stack(keep: Keep, op: int, nodes: int, reduce: bool) -> tuple[list[int], int]:
    """The edges whose weights and moments of `op` are stacked, in order, and the stride they are for.

    A skip connection has weights where it halves the image: on a reduction cell's input edges.
    """
    ends = edge_ends(nodes)
    strided = [e for e in range(len(ends)) if reduce and ends[e][0] < 2]
    if OPS[op] == "skip_connect":
        return (carriers(keep, op, strided), 2) if reduce else ([], 1)
    return carriers(keep, op, list(range(len(ends)))), 1


def has_norm(op: str, stride: int) -> bool:
    """Whether the operation ends in a batch norm; `none` and the identity do not."""
    return op != "none" and (op != "skip_connect" or stride == 2)


def op_shapes(op: str, width: int, stride: int) -> dict[str, tuple[int, ...]]:
    """Weights of one operation at width C, by name; the second half of a separable convolution ends in _2."""
    if op == "skip_connect" and stride == 2:
        return {"even": (width // 2, width), "odd": (width // 2, width)}
    if op not in KERNEL:
        return {}
    size = KERNEL[op]
    first = {"depthwise": (width, size, size), "pointwise": (width, width)}
    if op.startswith("dil"):
        return first
    return first | {f"{name}_2": shape for name, shape in first.items()}


def norm_names(op: str, stride: int) -> tuple[str, ...]:
    """Batch norms of one operation: the second one of a separable convolution ends in _2."""
    if not has_norm(op, stride):
        return ()
    return ("norm", "norm_2") if op.startswith("sep") else ("norm",)


class Norms:
    """Batch norms of one forward pass: with given moments, or with the batch's own, which it collects."""

    def __init__(self, given: Tree | None):
        self.given, self.found = given, {}

    def __call__(self, name: str, x: Array) -> Array:
        if self.given is not None:
            return layers.frozen_norm(x, *self.given[name])
        y, mean, variance = layers.batch_norm(x)
        self.found[name] = (mean, variance)
        return y


def factorized_reduce(relu_x: Array, even: Array, odd: Array) -> Array:
    """Halves H and W: two 1x1 stride-2 convolutions, the second on the image shifted by one pixel.

    relu_x [I, H, W, N] (after its ReLU), even and odd [O/2, I] -> [O, H/2, W/2, N], before its batch norm.
    """
    first = layers.pointwise(layers.settled(relu_x[:, ::2, ::2]), even)
    second = layers.pointwise(layers.settled(relu_x[:, 1::2, 1::2]), odd)
    return jnp.concatenate([first, second])


def _operation(op: str, x: Array, relu_x: Array, weights: dict, norm: Norms, stride: int) -> Array:
    if op == "max_pool_3x3":
        return norm("norm", layers.max_pool(x, stride))
    if op == "avg_pool_3x3":
        return norm("norm", layers.avg_pool(x, stride))
    if op == "skip_connect":
        return x if stride == 1 else norm("norm", factorized_reduce(relu_x, weights["even"], weights["odd"]))
    dilation = 2 if op.startswith("dil") else 1
    y = layers.depthwise(relu_x, weights["depthwise"], stride, dilation)
    y = norm("norm", layers.pointwise(layers.settled(y), weights["pointwise"]))
    if op.startswith("sep"):
        y = layers.depthwise(jax.nn.relu(y), weights["depthwise_2"], 1, 1)
        y = norm("norm_2", layers.pointwise(layers.settled(y), weights["pointwise_2"]))
    return y


def mixed_edge(plan, stride: int, x: Array, weights: Tree, given: Tree | None, mix: Array, alive: Array):
    """sum_k mix_k o_k(x) over the operations of `plan`, as (op index, on every edge?) pairs.

    x [C, H, W, N], mix [ops], alive [ops] bool. An operation that only some edges carry is skipped by
    `lax.cond` where it is dead. Returns (y [C, H/stride, W/stride, N], {op: moments}).
    """
    relu_x = lax.optimization_barrier(jax.nn.relu(x))
    total, moments = None, {}
    for k, everywhere in plan:
        op = OPS[k]

        def run(x, relu_x, weights, weight, op=op):
            norm = Norms(None if given is None else given[op])
            y = _operation(op, x, relu_x, weights, norm, stride)
            return weight.astype(y.dtype) * y, norm.found

        arguments = (x, relu_x, weights[op], mix[k])
        if everywhere:
            y, found = run(*arguments)
        else:
            shapes = jax.eval_shape(run, *arguments)
            dead = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            y, found = lax.cond(alive[k], run, lambda *_, dead=dead: dead, *arguments)
        total = y if total is None else total + y
        moments[op] = found
    return total, moments


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def run_edges(plan, stride: int, train: bool, schedule, source: Array, node: Array, weights, stats, mix):
    """Adds every edge's output to the node it ends in.

    schedule: (from [E], to [E], alive [E, ops]); source [inputs, C, H, W, N] or None when the edges read
    from `node` [nodes, C, H', W', N] itself; weights, stats and mix lead with E.
    Returns (node, {op: moments [E, ...]}).
    """

    def step(node, edge):
        (start, end, alive), weights, stats, mix = edge
        x = (node if source is None else source)[start]
        y, moments = mixed_edge(plan, stride, x, weights, None if train else stats, mix, alive)
        return node.at[end].add(y), moments

    return lax.scan(step, node, (schedule, weights, stats, mix))


def _run_edges_forward(plan, stride, train, schedule, source, node, weights, stats, mix):
    out, moments = run_edges(plan, stride, train, schedule, source, node, weights, stats, mix)
    return (out, moments), (schedule, source, out, weights, stats, mix)


def _run_edges_backward(plan, stride, train, saved, cotangents):
    schedule, source, node, weights, stats, mix = saved
    # The moments feed running averages alone, which no gradient passes.
    grad_node = cotangents[0]
    grad_source = None if source is None else jnp.zeros_like(source)

    def step(carry, edge):
        grad_node, grad_source = carry
        (start, end, alive), weights, stats, mix = edge
        x = (node if source is None else source)[start]

        def output(x, weights, mix):
            return mixed_edge(plan, stride, x, weights, None if train else stats, mix, alive)[0]

        grad_x, grad_weights, grad_mix = jax.vjp(output, x, weights, mix)[1](grad_node[end])
        if source is None:
            grad_node = grad_node.at[start].add(grad_x)
        else:
            grad_source = grad_source.at[start].add(grad_x)
        return (grad_node, grad_source), (grad_weights, grad_mix)

    # Edges backwards: a node's gradient is complete before the edges that end in it are visited.
    (grad_node, grad_source), (grad_weights, grad_mix) = lax.scan(
        step, (grad_node, grad_source), (schedule, weights, stats, mix), reverse=True
    )
    no_schedule = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), schedule)
    no_stats = jax.tree.map(jnp.zeros_like, stats)
    return no_schedule, grad_source, grad_node, grad_weights, no_stats, grad_mix


run_edges.defvjp(_run_edges_forward, _run_edges_backward)


def cell(
    inputs: Array, weights: Tree, stats: Tree, mix: Array, keep: Keep, nodes: int, reduce: bool, train: bool
) -> tuple[Array, Tree]:
    """One cell: inputs [2, C, H, W, N] (preprocessed) -> ([nodes, C, H', W', N], moments of its batch norms).

    weights and stats: {op: {name: [edges of its `stack`, ...]}}. mix [edges, ops].
    """
    ends = edge_ends(nodes)
    live = [e for e in range(len(ends)) if any(OPS[k] != "none" for k in keep[e])]
    shape = inputs.shape[1:]
    if reduce:
        shape = (shape[0], shape[1] // 2, shape[2] // 2, shape[3])
        node = jnp.zeros((nodes, *shape), inputs.dtype)
        stages = [
            (2, inputs, [e for e in live if ends[e][0] < 2], 0, 0),
            (1, None, [e for e in live if ends[e][0] >= 2], 2, 0),
        ]
    else:
        node = jnp.concatenate([inputs, jnp.zeros((nodes, *shape), inputs.dtype)])
        stages = [(1, None, live, 0, 2)]

    found: dict = {}
    for stride, source, edges, from_shift, to_shift in stages:
        if not edges:
            continue
        ops = [k for k in range(1, len(OPS)) if carriers(keep, k, edges)]
        plan = tuple((k, len(carriers(keep, k, edges)) == len(edges)) for k in ops)
        schedule = (
            jnp.array([ends[e][0] - from_shift for e in edges]),
            jnp.array([ends[e][1] + to_shift for e in edges]),
            jnp.array([[k in keep[e] for k in range(len(OPS))] for e in edges]),
        )
        rows = {}
        for k in ops:
            place = {e: n for n, e in enumerate(stack(keep, k, nodes, reduce)[0])}
            # A dead edge is given row 0: its operation is skipped, so the row is never used.
            rows[OPS[k]] = np.array([place.get(e, 0) for e in edges])
        weights_e, stats_e = (
            {
                op: jax.tree.map(lambda x, place=place: x[place], tree.get(op, {})) if has_norm(op, stride) else {}
                for op, place in rows.items()
            }
            for tree in (weights, stats)
        )
        node, moments = run_edges(plan, stride, train, schedule, source, node, weights_e, stats_e, mix[np.array(edges)])
        for k in ops:
            here = np.array([n for n, e in enumerate(edges) if k in keep[e]])
            part = jax.tree.map(lambda m, here=here: m[here], moments[OPS[k]])
            if part:
                found.setdefault(OPS[k], []).append((carriers(keep, k, edges), part))
    return (node if reduce else node[2:]), {op: _in_edge_order(parts) for op, parts in found.items()}


def _in_edge_order(parts):
    """Moments of a cell's two scans, joined and put into the order of the edges."""
    order = np.argsort(np.concatenate([edges for edges, _ in parts]))
    return jax.tree.map(lambda *m: jnp.concatenate(m)[order], *[part for _, part in parts])
