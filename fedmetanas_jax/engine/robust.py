"""Stages that make one change of a cohort's and withstand some clients that send anything.

Yin, Chen, Ramchandran, Bartlett: Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates, ICML 2018.
Both look at every number by itself, and clients count the same whatever their n_k: a weight is what a client says of
itself. A client of weight 0 was left out (see aggregate.finite) and counts in no rank. How many are heard is a traced
number, so those left out are ranked behind everybody, and the ranks to take follow from the count.
"""

import math

import jax
import jax.numpy as jnp

from fedmetanas_jax import tree
from fedmetanas_jax.core import Aggregate, Array, Tree
from fedmetanas_jax.options import UsageError


def median() -> Aggregate:
    """The median of every number over the clients heard, the mean of the middle two of an even number; 0 if nobody is.

    It lies among the honest clients' values while fewer than half of those heard send something else.
    """

    def apply(change: Tree, weight: Array, key: Array):
        heard = weight > 0
        count = jnp.sum(heard)
        low, high = jnp.maximum(count - 1, 0) // 2, count // 2
        ranked = _ranked(change, heard)
        middle = jax.tree.map(lambda x: (0.5 * x[low] + 0.5 * x[high]).astype(x.dtype), ranked)
        return tree.where(count > 0, middle, tree.zeros_like(middle)), weight, {}

    return Aggregate(apply, by_rank=True)


def trimmed(share: float) -> Aggregate:
    """The mean of every number over the c clients heard, but for the floor(share c) largest and as many smallest; 0 if
    nobody is.

    It lies among the honest clients' values while at most floor(share c) send something else. ValueError for a share
    that is not above 0 and below 0.5; UsageError, where it is applied, for a cohort of which it would trim nobody.
    """
    if not 0 < share < 0.5:
        raise ValueError(f"trimmed:{share:g}: the share must be above 0 and below 0.5")

    def apply(change: Tree, weight: Array, key: Array):
        size = len(weight)
        if cut_of(share, size) == 0:
            raise UsageError(
                f"config.aggregate: trimmed:{share:g} trims nobody of {size} clients (config.cohort), so it withstands "
                "nobody; it takes at least 3 clients, and a share of at least 1 / config.cohort"
            )
        heard, rank = weight > 0, jnp.arange(size)
        count = jnp.sum(heard)
        cut = jnp.asarray([cut_of(share, c) for c in range(size + 1)])[count]
        # Chosen and not multiplied by 0: what is trimmed may be infinite in a sum.
        inner = (rank >= cut) & (rank < count - cut)
        kept = jax.vmap(tree.where)(inner, _ranked(change, heard), tree.zeros_like(change))
        mean = jax.tree.map(lambda x: (jnp.sum(x, axis=0) / jnp.maximum(count - 2 * cut, 1)).astype(x.dtype), kept)
        return mean, weight, {}

    return Aggregate(apply, by_rank=True)


def cut_of(share: float, clients: int) -> int:
    """floor(share clients) of the share as it is written: 0.29 of 100 is 29, though in binary a little less."""
    return math.floor(round(share * clients, 9))


def _ranked(change: Tree, heard: Array) -> Tree:
    """Every number sorted along the cohort, leaves [cohort, ...]; who was not heard comes last, as infinity."""
    behind = jax.tree.map(lambda x: jnp.full_like(x, jnp.inf), change)
    return jax.tree.map(lambda x: jnp.sort(x, axis=0), jax.vmap(tree.where)(heard, change, behind))
