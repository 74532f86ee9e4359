"""What all search spaces share: kernels stacked over edges, the head, cutting a network down and deriving one.

Weights and moments of one operation are stacked over the edges of a cell that carry it, {"cell_0": {operation:
{name: [edges, ...]}}}, so that cutting a network down takes rows away.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fedmetanas_jax.core import Array, Graph, Model, SearchSpace, Supernet, Tree
from fedmetanas_jax.models import layers
from fedmetanas_jax.models.weights import Path, Weight, functions


def kernel(shape: tuple[int, ...], area: int, edges: tuple[int, ...] = ()) -> Weight:
    """A kernel [O, ...] or one for each of `edges` [rows], as PyTorch draws them (DARTS sets none itself).

    U(-1, 1) / sqrt(fan_in), where an output sums over all axes but the first.
    """
    return Weight((*edges, *shape), area, np.prod(shape[1:]) ** -0.5)


def head_weights(features: int, classes: int) -> dict[Path, Weight]:
    """What `head` takes."""
    bias = Weight((classes,), scale=features**-0.5)
    return {("head_kernel",): kernel((classes, features), 1), ("head_bias",): bias}


def head(x: Array, params: Tree) -> Array:
    """Global average pool and linear layer: x [F, H, W, N] -> logits [N, classes], in at least float32."""
    return (params["head_kernel"] @ layers.global_pool(x)).T + params["head_bias"]


def supernet(weights: dict, norms: dict, forward: Callable, mean, std, dtype) -> Supernet:
    """The Supernet of forward(params, stats, x, train, mix) -> (logits, moments); the rest as `weights.functions`."""
    draw = partial(jax.random.uniform, dtype=jnp.float32, minval=-1, maxval=1)
    init, apply, macs = functions(weights, norms, forward, draw, mean, std, dtype)
    return Supernet(init, lambda params, stats, image, mix, train: apply(params, stats, image, train, mix), 0.1, macs)


def search_space(graph: Graph, make: Callable, stacks: Callable) -> SearchSpace:
    """The space of make(plan of tuples, **size) -> Supernet; stacks(plan) says {cell: {operation: its edges}}."""

    def hashable(plan):
        return tuple(tuple(map(tuple, edges)) for edges in plan)

    def carry_over(tree, old, new):
        """Works on any tree laid out like `params` or `stats`, so on optimizer states of either too."""
        had, has, pruned = stacks(hashable(old)), stacks(hashable(new)), dict(tree)
        for cell in had.keys() & tree.keys():
            pruned[cell] = {name: x for name, x in tree[cell].items() if has[cell].get(name, True)}
            for op in had[cell].keys() & pruned[cell].keys():
                rows = np.array([had[cell][op].index(e) for e in has[cell][op]])
                pruned[cell][op] = jax.tree.map(lambda x, rows=rows: x[rows], tree[cell][op])
            if not pruned[cell]:
                del pruned[cell]
        return pruned

    def derive(plan, **size):
        net = make(hashable(plan), **size)
        mix = np.array([[[k in ops for k in range(len(graph.ops))] for ops in edges] for edges in plan], np.float32)

        def apply(params, stats, image, train, key=None):
            return net.apply(params, stats, image, jnp.asarray(mix), train)

        return Model(net.init, apply, net.momentum, net.macs, head=("head_bias", "head_kernel"))

    return SearchSpace(graph, lambda plan: make(hashable(plan)), carry_over, derive)
