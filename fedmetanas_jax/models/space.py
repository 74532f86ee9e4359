"""What all search spaces share: declared weights, the supernet around a forward function, cutting and deriving.

A network is plain functions of nested dicts. Weights and moments of one operation are stacked over the edges of a
cell that carry it, {"cell_0": {operation: {name: [edges, ...]}}}, so that cutting a network down takes rows away.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from fedmetanas_jax.core import Array, Graph, Model, SearchSpace, Supernet, Tree
from fedmetanas_jax.models import layers


class Weight(NamedTuple):
    """A declared weight."""

    shape: tuple[int, ...]
    area: int = 0  # positions of one image at which each of its numbers is multiplied
    fan_in: int = 1
    start: float | None = None  # its initial value, where that is not drawn


def kernel(shape: tuple[int, ...], area: int, edges: tuple[int, ...] = ()) -> Weight:
    """A kernel [O, ...] each of whose outputs sums over all but its first axis; one for each of `edges` [rows]."""
    return Weight((*edges, *shape), area, int(np.prod(shape[1:])))


def head(x: Array, params: Tree) -> Array:
    """Global average pool and linear layer: x [F, H, W, N] -> logits [N, classes], in at least float32."""
    features = jnp.mean(x.astype(jnp.promote_types(x.dtype, jnp.float32)), (1, 2))
    return (params["head_kernel"] @ features).T + params["head_bias"]


def head_weights(features: int, classes: int) -> dict[tuple[str, ...], Weight]:
    """What `head` takes."""
    bias = Weight((classes,), fan_in=features)
    return {("head_kernel",): kernel((classes, features), 1), ("head_bias",): bias}


def initial(key: Array, weights: dict[tuple[str, ...], Weight]) -> dict:
    """Float32 values as PyTorch draws them (DARTS sets none itself): U(-1, 1) / sqrt(fan_in); nested by path.

    All are cut from one draw: XLA takes about half a second to compile each draw of its own.
    """
    paths = sorted(weights)
    ends = np.cumsum([np.prod(weights[path].shape) for path in paths], dtype=int)
    pieces = jnp.split(jax.random.uniform(key, (ends[-1],), jnp.float32, -1, 1), ends[:-1])
    values = {}
    for path, piece in zip(paths, pieces, strict=True):
        shape, _, fan_in, start = weights[path]
        drawn = piece.reshape(shape) / np.sqrt(fan_in)
        values[path] = drawn if start is None else jnp.full(shape, start, jnp.float32)
    return unflatten_dict(values)


def supernet(
    weights: dict[tuple[str, ...], Weight], norms: dict[tuple[str, ...], tuple[int, ...]], forward: Callable,
    mean: tuple[float, ...], std: tuple[float, ...], dtype,
) -> Supernet:  # fmt: skip
    """The Supernet of forward(params, stats, x [channels, H, W, N], mix, train) -> (logits, moments found).

    `weights` and `norms` (the shapes of their moments) are declared by path. Multiply-adds are those of convolutions
    and head; batch norm, pooling and sums are not counted. Weights, moments and logits are float32; `dtype` is what
    the layers compute in.
    """

    def init(key):
        moments = {(*path, name): shape for path, shape in norms.items() for name in ("mean", "var")}
        stats = {path: jnp.full(shape, path[-1] == "var", jnp.float32) for path, shape in moments.items()}
        return initial(key, weights), unflatten_dict(stats)

    def apply(params, stats, image, mix, train):
        x = layers.normalize(image, mean, std, dtype)
        logits, moments = forward(params, stats, x, mix, train)
        return logits, moments if train else stats

    macs = sum(int(np.prod(weight.shape)) * weight.area for weight in weights.values())
    return Supernet(init, apply, momentum=0.1, macs=macs)


def search_space(graph: Graph, make: Callable, stacks: Callable) -> SearchSpace:
    """The space of make(plan of tuples, **size) -> Supernet; stacks(plan) says {cell: {operation: its edges}}."""

    def hashable(plan):
        return tuple(tuple(map(tuple, edges)) for edges in plan)

    def carry_over(tree, old, new):
        """Works on any tree laid out like `params` or `stats`, so on optimizer states of either too."""
        had, has, pruned = stacks(hashable(old)), stacks(hashable(new)), dict(tree)
        for cell, stack in had.items():
            pruned[cell] = {name: x for name, x in tree[cell].items() if has[cell].get(name, True)}
            for op in stack.keys() & pruned[cell].keys():
                rows = np.array([stack[op].index(e) for e in has[cell][op]])
                pruned[cell][op] = jax.tree.map(lambda x, rows=rows: x[rows], tree[cell][op])
        return pruned

    def derive(plan, **size):
        net = make(hashable(plan), **size)
        mix = np.array([[[k in ops for k in range(len(graph.ops))] for ops in edges] for edges in plan], np.float32)

        def apply(params, stats, image, train, key=None):
            return net.apply(params, stats, image, jnp.asarray(mix), train)

        return Model(net.init, apply, net.momentum, net.macs, head=("head_bias", "head_kernel"))

    return SearchSpace(graph, lambda plan: make(hashable(plan)), carry_over, derive)
