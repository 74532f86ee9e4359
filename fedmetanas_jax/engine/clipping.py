"""Clipping: by how much one client can move a part of the network is bounded by a norm.

A function of one client's change alone, so whoever holds the change can do it: the server here, the client itself where
the server is not to see the change (engine/secure.py).
"""

import math

import jax
import jax.numpy as jnp

from fedmetanas_jax import tree
from fedmetanas_jax.core import Aggregate, Array, Tree

APART = ("alpha", "stats")  # parts with a norm of their own; all others have one together


def clip(weights: float, alpha: float | None = None, stats: float | None = None) -> Aggregate:
    """Scales a client's change down to these Euclidean norms: of the weights (all parts but the other two together),
    of the architecture parameters, of the batch-norm statistics; None leaves a part as it is.

    Metric "clipped" [cohort]: 1 where something was scaled. ValueError for a norm that is not positive.
    """
    check(weights, alpha, stats)

    def apply(change: Tree, weight: Array, key: Array):
        change, clipped = jax.vmap(lambda x: to_norms(x, weights, alpha, stats))(change)
        return change, weight, {"clipped": clipped.astype(jnp.float32)}

    return Aggregate(apply)


def check(*norms: float | None) -> None:
    """ValueError for a norm that is not positive; None is none."""
    for norm in norms:
        if norm is not None and not 0 < norm < math.inf:
            raise ValueError(f"clip:{norm}: a norm to clip to must be positive and finite")


def to_norms(change: dict, weights: float | None, alpha: float | None, stats: float | None) -> tuple[dict, Array]:
    """One client's change, scaled down to the norms of `clip`, and whether anything was, [] bool."""
    scaled, clipped = dict(change), jnp.array(False)
    for names, norm in parts(change, weights, alpha, stats):
        if norm is not None:
            part = {name: change[name] for name in names}
            length = tree.global_norm(part)
            scaled |= tree.scale(part, norm / jnp.maximum(length, norm))
            clipped |= length > norm
    return scaled, clipped


def parts(change: dict, weights, alpha, stats) -> list[tuple[tuple[str, ...], float | None]]:
    """[(the names of a change's parts that are clipped together, their norm)]"""
    most = dict(zip(APART, (alpha, stats), strict=True))
    together = tuple(name for name in change if name not in APART)
    return [(together, weights), *(((name,), most[name]) for name in APART if name in change)]
