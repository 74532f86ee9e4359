"""The candidate operations of a DARTS cell (Liu et al., ICLR 2019; methods section 3.2), and their sums.

An edge's output is sum_k mix_k o_k(x). The operations without weights (pooling with its batch norm, the
identity) depend on the source alone, so a source computes them once for all edges that leave it
(`weightless`); convolutions have weights of their own on every edge (`weighted`).

Moments are {"mean": [C], "var": [C]}. Where `given` ones are asked for, None stands for the batch's own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fedmetanas_jax.core import Array, Tree
from fedmetanas_jax.models import batchnorm, layers
from fedmetanas_jax.models.plan import OPS

POOLS = {"max_pool_3x3": layers.max_pool, "avg_pool_3x3": layers.avg_pool}


class Op(NamedTuple):
    """An operation to compute: its number and whether all that are computed together carry it."""

    number: int
    everywhere: bool

    @property
    def name(self) -> str:
        """As in OPS."""
        return OPS[self.number]


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

    x [C, H, W, N], mix [nodes, those ops], alive [ops] bool (on some edge that leaves the source), `given`
    {op: {"norm": moments [nodes, C]}}. Returns (y [nodes, C, H/stride, W/stride, N], {op: {"norm": moments}}).
    """
    parts, moments = [], {}
    for op in ops:

        def run(x, name=op.name):
            y = POOLS[name](x, stride) if name in POOLS else x
            if name not in POOLS or given is not None:
                return y, {}
            y, found = batchnorm.norm(y, None)
            return y, {"norm": found}

        y, moments[op.name] = where_alive(op.everywhere, alive[op.number], run, x)
        parts.append(y)
    mix = mix.astype(x.dtype)
    if given is None:
        # A matrix product, since XLA:CPU would compute an elementwise sum's terms anew for every node.
        flat = layers.settled(jnp.stack(parts)).reshape(len(parts), -1)
        return jnp.matmul(mix, flat, precision=lax.Precision.HIGHEST).reshape(-1, *parts[0].shape), moments
    total = 0.0
    for k, (op, y) in enumerate(zip(ops, parts, strict=True)):
        if op.name in POOLS:
            y, found = jax.vmap(batchnorm.norm, (None, 0))(y, given[op.name]["norm"])
            if found:  # the same for every node
                moments[op.name] = {"norm": jax.tree.map(lambda m: m[0], found)}
        total = total + mix[:, k, None, None, None, None] * y
    return total, moments


def weighted(ops: tuple[Op, ...], stride: int, relu_x: Array, weights: Tree, given: Tree | None, mix: Sequence, alive):
    """What an edge adds to the node it ends in by operations with weights.

    relu_x [C, H, W, N] (the source after its ReLU), mix: [] for each of those ops, alive [ops] bool, weights and
    `given` moments {op: {name: ...}}. Returns (y [C, H/stride, W/stride, N], {op: {name: moments}}).
    """
    total, moments = None, {}
    for op, share in zip(ops, mix, strict=True):

        def run(relu_x, weights, given, weight, name=op.name):
            return _convolutions(name, stride, relu_x, weights, given, weight)

        given_here = None if given is None else given[op.name]
        y, moments[op.name] = where_alive(
            op.everywhere, alive[op.number], run, relu_x, weights[op.name], given_here, share
        )
        total = y if total is None else total + y
    return total, moments


def _convolutions(name: str, stride: int, relu_x: Array, weights: dict, given: dict | None, weight: Array):
    """weight * o(x) and the moments found, of one operation with weights."""
    found = {}

    def norm(norm_name: str, x: Array, weight: Array | None = None) -> Array:
        y, found[norm_name] = batchnorm.norm(x, None if given is None else given[norm_name], weight)
        return y

    def separable(x: Array, which: str, stride: int, dilation: int) -> Array:
        y = layers.depthwise(x, weights[f"depthwise{which}"], stride, dilation)
        return layers.pointwise(layers.settled(y), weights[f"pointwise{which}"])

    if name == "skip_connect":
        return norm("norm", factorized_reduce(relu_x, weights["even"], weights["odd"]), weight), found
    y = separable(relu_x, "", stride, 2 if name.startswith("dil") else 1)
    if name.startswith("dil"):
        return norm("norm", y, weight), found
    y = separable(jax.nn.relu(norm("norm", y)), "_2", 1, 1)
    return norm("norm_2", y, weight), found
