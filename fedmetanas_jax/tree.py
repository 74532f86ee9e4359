"""Arithmetic on pytrees."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedmetanas_jax.core import Array, Tree


def add(a: Tree, b: Tree) -> Tree:
    """a + b, leaf by leaf."""
    return jax.tree.map(jnp.add, a, b)


def sub(a: Tree, b: Tree) -> Tree:
    """a - b, leaf by leaf."""
    return jax.tree.map(jnp.subtract, a, b)


def scale(a: Tree, factor) -> Tree:
    """factor * a, leaf by leaf."""
    return jax.tree.map(lambda x: factor * x, a)


def zeros_like(a: Tree) -> Tree:
    """Zeros of a's shapes and types."""
    return jax.tree.map(jnp.zeros_like, a)


def where(condition: Array, a: Tree, b: Tree) -> Tree:
    """a where the scalar `condition` holds, else b."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def only(here: Tree, x: Tree) -> Tree:
    """x where the tree of bool `here`, which broadcasts to it, is True, else 0."""
    return jax.tree.map(lambda held, leaf: jnp.where(held, leaf, 0), here, x)


def lerp(a: Tree, b: Tree, share: float) -> Tree:
    """(1 - share) a + share b: one step of an exponential moving average. Where a = b it stays, to the bit."""
    return jax.tree.map(lambda x, y: jnp.where(x == y, x, (1 - share) * x + share * y), a, b)


def weighted_mean(stacked: Tree, weight: Array) -> Tree:
    """Mean over the leading axis (Eq. 3's n_k / n): leaves [k, ...] and weight [k] -> leaves [...].

    The weights are divided before they are applied and the sum runs in float32, so the mean of equal
    rows stays within rounding of the row, whatever the size of the weights. 0 where all weights are 0.
    """
    total = jnp.sum(weight)
    share = weight / jnp.where(total == 0, 1.0, total)

    def at_once(share: Array, stacked: Tree) -> Tree:
        return jax.tree.map(lambda x: jnp.einsum("k,k...->...", share, x), stacked)

    def in_turn(share: Array, stacked: Tree) -> Tree:
        def add(k: Array, sums: Tree) -> Tree:
            return jax.tree.map(lambda s, x: s + share[k] * x[k], sums, stacked)

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], jnp.promote_types(x.dtype, share.dtype)), stacked)
        return jax.lax.fori_loop(0, len(share), add, zeros)

    # A CPU compiles a dot product for every leaf, but a sum once for all leaves of a shape (docs/formulations.md).
    mean = jax.lax.platform_dependent(share, stacked, cpu=in_turn, default=at_once)
    return jax.tree.map(lambda m, x: m.astype(x.dtype), mean, stacked)


def take(stacked: Tree, rows: Array) -> Tree:
    """Rows of every leaf: [clients, ...] and rows [k] -> [k, ...]."""
    return jax.tree.map(lambda x: x[rows], stacked)


def put(stacked: Tree, rows: Array, values: Tree) -> Tree:
    """Leaves [clients, ...] with `rows` [k] replaced by values' [k, ...]; other rows keep their bits."""
    return jax.tree.map(lambda x, v: x.at[rows].set(v), stacked, values)


def each(function: Callable, *stacked: Tree) -> Tree:
    """function(row, ...) of every row of leaves [k, ...]: what a server does client by client."""
    return jax.vmap(function)(*stacked)


def split(params: dict, names: tuple[str, ...]) -> tuple[dict, dict]:
    """(the entries of `names`, all others) of a dict: a network's head and its body."""
    return {n: params[n] for n in names}, {n: x for n, x in params.items() if n not in names}


def global_norm(a: Tree) -> Array:
    """Euclidean length of all leaves together."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(a)))


def all_finite(a: Tree) -> Array:
    """[] bool: no leaf holds an infinity or a NaN."""
    floats = [x for x in jax.tree.leaves(a) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats] or [jnp.array(True)]))


def form(a: Tree) -> tuple:
    """Structure, shapes and types, to be compared; hashable."""
    return jax.tree.structure(a), tuple((x.shape, x.dtype) for x in jax.tree.leaves(a))


def nbytes(a: Tree) -> int:
    """Bytes of all leaves (arrays or their ShapeDtypeStructs)."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(a))
