"""The candidate operations of a DARTS cell (Liu et al., ICLR 2019; methods section 3.2), and their sums.

An edge's output is sum_k mix_k o_k(x). The operations without weights (pooling with its batch norm, the
identity) depend on the source alone, so a source computes them once for all edges that leave it
(`weightless`); convolutions have weights of their own on every edge (`weighted`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedmetanas_jax.core import Array, Tree
from fedmetanas_jax.models import batchnorm, layers
from fedmetanas_jax.topology import OPS, edge_ends

KERNEL = {"sep_conv_3x3": 3, "sep_conv_5x5": 5, "dil_conv_3x3": 3, "dil_conv_5x5": 5}

POOLS = {"max_pool_3x3": layers.max_pool, "avg_pool_3x3": layers.avg_pool}

KERNELS = ("plain", "pallas", "interpret")  # what computes a depthwise with its pointwise layer: see `separable`

Keep = tuple[tuple[int, ...], ...]  # of one cell type: the operations alive on each edge


class Op(NamedTuple):
    """An operation to compute: its number and whether all that are computed together carry it."""

    number: int
    everywhere: bool


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


def factorized_reduce(relu_x: Array, even: Array, odd: Array) -> Array:
    """Halves H and W: two 1x1 stride-2 convolutions, the second on the image shifted by one pixel.

    relu_x [I, H, W, N] (after its ReLU), even and odd [O/2, I] -> [O, H/2, W/2, N], before its batch norm.
    """
    first = layers.pointwise(layers.settled(relu_x[:, ::2, ::2]), even)
    second = layers.pointwise(layers.settled(relu_x[:, 1::2, 1::2]), odd)
    return jnp.concatenate([first, second])


def where_alive(always: bool, alive: Array, run, *arguments):
    """run(*arguments), skipped in favour of zeros where `alive` [] is False; `always` says it never is."""
    if always:
        return run(*arguments)
    shapes = jax.eval_shape(run, *arguments)
    dead = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return lax.cond(alive, run, lambda *_: dead, *arguments)


def weightless(ops: tuple[Op, ...], stride: int, x: Array, given: Tree | None, mix: Array, alive: Array):
    """What a source adds to every node by operations without weights.

    x [C, H, W, N], mix [nodes, ops], alive [ops] bool (on some edge that leaves the source). `given` are
    the moments {op: {"norm": (mean [nodes, C], variance [nodes, C])}} to normalise by; where it is None the
    batch's own do. Returns (y [nodes, C, H/stride, W/stride, N], {op: {"norm": moments [C]}}).
    """
    parts, moments = [], {}
    for op in ops:
        name = OPS[op.number]

        def run(x, name=name):
            y = POOLS[name](x, stride) if name in POOLS else x
            if name == "skip_connect" or given is not None:
                return y, {}
            y, *found = batchnorm.batch_norm(y)
            return y, {"norm": tuple(found)}

        y, moments[name] = where_alive(op.everywhere, alive[op.number], run, x)
        parts.append(y)
    mix = mix[:, np.array([op.number for op in ops])].astype(x.dtype)
    if given is None:
        # A matrix product, since XLA:CPU would compute an elementwise sum's terms anew for every node.
        flat = layers.settled(jnp.stack(parts)).reshape(len(parts), -1)
        return jnp.matmul(mix, flat, precision=lax.Precision.HIGHEST).reshape(-1, *parts[0].shape), moments
    total = 0.0
    for k, (op, y) in enumerate(zip(ops, parts, strict=True)):
        known = given.get(OPS[op.number])
        y = y[None] if known is None else jax.vmap(batchnorm.frozen_norm, (None, 0, 0))(y, *known["norm"])
        total = total + mix[:, k, None, None, None, None] * y
    return total, moments


def weighted(
    ops: tuple[Op, ...], stride: int, relu_x: Array, weights: Tree, given: Tree | None, mix: Array, alive, kernel: str
):
    """What an edge adds to the node it ends in by operations with weights.

    relu_x [C, H, W, N] (the source after its ReLU), mix [ops], alive [ops] bool, weights and `given` moments
    {op: {name: ...}}; None: the batch's own; kernel one of `KERNELS`. Returns (y [C, H/stride, W/stride, N],
    {op: {name: moments}}).
    """
    total, moments = None, {}
    for op in ops:
        name = OPS[op.number]

        def run(relu_x, weights, given, weight, name=name):
            return _convolutions(name, stride, relu_x, weights, given, weight, kernel)

        given_here = None if given is None else given[name]
        y, moments[name] = where_alive(
            op.everywhere, alive[op.number], run, relu_x, weights[name], given_here, mix[op.number]
        )
        total = y if total is None else total + y
    return total, moments


def separable(kernel: str, relu_x: Array, depthwise: Array, pointwise: Array, stride: int, dilation: int):
    """(depthwise, then pointwise layer of relu_x, its (mean, variance) if they were found on the way, else None).

    The Pallas kernels take the ReLU once more, which changes nothing.
    """
    if kernel == "plain":
        y = layers.depthwise(relu_x, depthwise, stride, dilation)
        return layers.pointwise(layers.settled(y), pointwise), None
    from fedmetanas_jax.models import fused  # here, so that nobody else waits for Pallas to be imported

    y, sums, squares = fused.relu_depthwise_pointwise(
        relu_x, depthwise, pointwise, stride, dilation, interpret=kernel == "interpret"
    )
    return y, (sums / y[0].size, squares / y[0].size)


def _convolutions(
    name: str, stride: int, relu_x: Array, weights: dict, given: dict | None, weight: Array, kernel: str
):
    """weight * o(x) and the moments found, of one operation with weights."""
    found = {}

    def norm(norm_name: str, x: Array, known: tuple | None, weight: Array | None = None) -> Array:
        if given is not None:
            y = batchnorm.frozen_norm(x, *given[norm_name])
            return y if weight is None else weight.astype(y.dtype) * y
        y, *moments = (
            batchnorm.batch_norm(x, known=known) if weight is None else batchnorm.weighted_norm(x, weight, known=known)
        )
        found[norm_name] = tuple(moments)
        return y

    if name == "skip_connect":
        return norm("norm", factorized_reduce(relu_x, weights["even"], weights["odd"]), None, weight), found
    dilation = 2 if name.startswith("dil") else 1
    y, known = separable(kernel, relu_x, weights["depthwise"], weights["pointwise"], stride, dilation)
    if name.startswith("dil"):
        return norm("norm", y, known, weight), found
    relu_y = jax.nn.relu(norm("norm", y, known))
    y, known = separable(kernel, relu_y, weights["depthwise_2"], weights["pointwise_2"], 1, 1)
    return norm("norm_2", y, known, weight), found
