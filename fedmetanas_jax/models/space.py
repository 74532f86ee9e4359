"""What all search spaces share: kernels stacked over edges, the head, cutting a network down and deriving one.

Weights and moments of one operation are stacked over the edges of a cell that carry it, {"cell_0": {operation:
{name: [edges, ...]}}}, so that cutting a network down takes rows away.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fedmetanas_jax.core import Array, Graph, Model, SearchSpace, Supernet, Tree
from fedmetanas_jax.models import layers
from fedmetanas_jax.models.weights import Path, Weight, functions


def cell_types(kinds: Sequence[str], parts: tuple[int, ...]) -> tuple[tuple[str, ...], list[int]]:
    """The types of cells by name, and which of them each cell is; cells of a type have the same operations.

    kinds: what each cell is; those are the types or, where the network is cut before the cells `parts`, those of each
    part, named by its first cell: normal_0, reduce_0, normal_6. ValueError for cuts that cannot be.
    """
    names = list(kinds)
    if parts:
        if list(parts) != sorted({*parts}) or parts[0] < 1 or parts[-1] >= len(kinds):
            most = len(kinds) - 1
            raise ValueError(f"parts of the network begin at {parts}; they must be ascending cells from 1 to {most}")
        first = [max(start for start in (0, *parts) if start <= i) for i in range(len(kinds))]
        names = [f"{kind}_{start}" for kind, start in zip(kinds, first, strict=True)]
    found = tuple(dict.fromkeys(names))
    return found, [found.index(name) for name in names]


def parts_of(names: Iterable[str]) -> tuple[int, ...]:
    """The cells at which parts begin, read off the names of `cell_types`."""
    ends = [name.rpartition("_")[2] for name in names]
    return tuple(sorted({int(end) for end in ends} - {0})) if all(end.isdecimal() for end in ends) else ()


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


def search_space(
    graph: Graph, types: list[int], make: Callable, stacks: Callable, resized: Callable,
    reads: tuple[tuple[int, int, int], ...] = (), skips: bool = False,
) -> SearchSpace:  # fmt: skip
    """The space of make(plan of tuples, sampled) -> Supernet whose cells, named cell_0, ... are of these types.

    stacks(plan) says {cell: {operation: the edges that its weights and moments are stacked over}}; resized(**size) is
    the maker of the space with its arguments; reads, skips: the space's.
    """

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

    def spread(value, plan, tree, rest):
        found = {}
        for kind, (cell, edges_of) in zip(types, stacks(hashable(plan)).items(), strict=True):
            for op, edges in edges_of.items():
                found[cell, op] = value[kind, np.array(edges, int), graph.ops.index(op)]

        def of_leaf(path, x):
            rows = found.get(tuple(key.key for key in path[:2]))
            return jnp.asarray(rest, value.dtype) if rows is None else rows.reshape(-1, *[1] * (x.ndim - 1))

        return jax.tree_util.tree_map_with_path(of_leaf, tree)

    def derive(plan):
        net = make(hashable(plan))
        mix = np.array([[[k in ops for k in range(len(graph.ops))] for ops in edges] for edges in plan], np.float32)

        def apply(params, stats, image, train, key=None):
            return net.apply(params, stats, image, jnp.asarray(mix), train)

        return Model(net.init, apply, net.momentum, net.macs, head=("head_bias", "head_kernel"))

    def make_any(plan, sampled=False):
        return make(hashable(plan), sampled)

    space = SearchSpace(graph, len(types), make_any, carry_over, derive, spread, resized, reads=reads, skips=skips)
    return _resizable(space, {})


def _resizable(space: SearchSpace, size: dict) -> SearchSpace:
    """The space, which remembers with what arguments of its own it was made."""

    def resized(**more):
        return _resizable(space.resized(**more), size | more)

    return space._replace(resized=resized, size=size)
