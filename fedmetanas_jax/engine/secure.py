"""Secure sums: each client's clipped change in fixed point, so that whoever adds them up need see the sum alone.

What a client adds are integers modulo 2^32, the 32 bits of an int32. They are added without rounding, in any order, and
with masks that cancel (deploy/masks.py) they come to the same sum. So a simulated run, which adds them as they are, and
a networked one, whose server learns nothing but the sum, have the same bits. After Bonawitz et al.: Practical Secure
Aggregation for Privacy-Preserving Machine Learning, CCS 2017.

    w = n_k / most                      in 0 to 1; `most` is what everybody knows that a client can weigh
    adds round(w x 2^a) for each number x of its clipped change, and round(w 2^b)

a, of a part with the norm C, is the largest whole number for which `cohort` such numbers cannot wrap; b is a for C = 1.
Powers of two, so that scaling rounds nothing. The mean (Eq. 3) is sum(w x) / sum(w).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedmetanas_jax.core import Aggregate, Algorithm, Array, Secure, Tree
from fedmetanas_jax.engine import clipping
from fedmetanas_jax.options import UsageError

HALF = 2**31 - 1  # the largest sum that has not wrapped
WORDS = {"alpha": "architecture parameters", "stats": "batch-norm statistics"}
PLACES = {"alpha": "second", "stats": "third"}
EXPONENTS = (-100, 100)  # beyond them a power of two times a float32 may be none


class Summand(NamedTuple):
    """What one client adds, or what some of them come to together."""

    change: dict  # leaves int32
    weight: Array  # [] int32


def secure(weights: float, alpha: float | None = None, stats: float | None = None) -> Aggregate:
    """The weighted mean of changes that are clipped to these norms (see clipping.clip), by a sum of integers.

    What is returned as weight is 1 for who was heard, since nobody but a client knows n_k. Metric "clipped" [cohort].
    ValueError for a norm that is not positive, and where it is applied before `within`; UsageError, where it is
    applied, for a part without a norm and for numbers that are not float32.
    """
    clipping.check(weights, alpha, stats)
    return _adding(Secure(weights, alpha, stats))


def within(aggregate: Aggregate, most: float) -> Aggregate:
    """The aggregate for clients that weigh at most `most`, unless it was told so already or has no secure sums."""
    how = aggregate.secure
    return aggregate if how is None or how.most is not None else _adding(how._replace(most=float(most)))


def of_sum(how: Secure, cohort: int) -> Aggregate:
    """The aggregate of a server that is given the sum, a Summand, in the place of changes, and has no metrics to add.
    """

    def apply(total: Summand, weight: Array, key: Array):
        return mean_of(how, total, cohort), _heard(weight), {}

    return Aggregate(apply, secure=how)


def _adding(how: Secure) -> Aggregate:
    def apply(change: dict, weight: Array, key: Array):
        size = len(weight)
        # One after another and behind fences, so that every client's integers are those that it computes alone.
        summands, clipped = jax.lax.map(lambda x: encode(how, *x, size), (change, weight))
        total = jax.tree.map(lambda x: jnp.sum(x, axis=0, dtype=jnp.int32), summands)
        return mean_of(how, total, size), _heard(weight), {"clipped": clipped}

    return Aggregate(apply, secure=how)


def encode(how: Secure, change: dict, weight: Array, cohort: int) -> tuple[Summand, Array]:
    """What one client adds, and whether its change was clipped, [] float32. A client of weight 0 adds 0; so does one
    whose reply is not finite, with which a run stops anyway."""
    _check(how, change)
    if how.most is None:
        raise ValueError("secure: what a client can weigh at most is not known yet (secure.within)")
    change, weight = jax.lax.optimization_barrier((change, weight))
    scaled, clipped = clipping.to_norms(change, how.weights, how.alpha, how.stats)
    share = jnp.clip(jnp.where(jnp.isfinite(weight), weight, 0.0) / how.most, 0.0, 1.0)
    found = {}
    for names, norm in _parts(how, change):
        part = {name: jax.tree.map(lambda x: share * x, scaled[name]) for name in names}
        found |= jax.tree.map(lambda x, norm=norm: _fixed(x, norm, cohort), part)
    summand = Summand({name: found[name] for name in change}, _fixed(share, 1.0, cohort))
    return jax.lax.optimization_barrier((summand, clipped.astype(jnp.float32)))


def mean_of(how: Secure, total: Summand, cohort: int) -> dict:
    """sum(w x) / sum(w) of what clients of such a cohort added; 0 where nobody did."""
    total = jax.lax.optimization_barrier(total)
    weight = total.weight.astype(jnp.float32) * 2.0 ** -exponent(1.0, cohort)
    share, found = jnp.where(weight > 0, weight, 1.0), {}
    for names, norm in _parts(how, total.change):
        unit = 2.0 ** -exponent(norm, cohort)
        for name in names:
            found[name] = jax.tree.map(lambda x, unit=unit: x.astype(jnp.float32) * unit / share, total.change[name])
    return jax.lax.optimization_barrier({name: found[name] for name in total.change})


def exponent(norm: float, cohort: int) -> int:
    """The largest k for which `cohort` numbers of at most round(norm 2^k) add up to less than 2^31.

    UsageError for so many clients that there is none, and for a norm that float32 cannot scale.
    """
    k = math.floor(math.log2(limit(cohort) / norm)) + 1
    while round(norm * 2.0**k) > limit(cohort):
        k -= 1
    if not EXPONENTS[0] <= k <= EXPONENTS[1]:
        raise UsageError(f"config.aggregate: secure cannot scale a norm of {norm:g} to 32 bits")
    return k


def limit(cohort: int) -> int:
    """The largest number that each of so many clients may add."""
    return HALF // cohort


def unlikely(how: Secure, total: Summand, heard: int, cohort: int) -> str:
    """What the sum of `heard` clients' summands (numpy) cannot be if all kept to the rules, or ''.

    That is all that can be checked of a client: a sum of changes within their norms is within as many norms.
    """
    most, weight = exponent(1.0, cohort), int(total.weight)
    if not 0 < weight <= heard * 2**most:
        return f"their weights come to {weight / 2**most:g} of at most {heard}"
    for names, norm in _parts(how, total.change):
        leaves = jax.tree.leaves([total.change[name] for name in names])
        unit, size = 2.0 ** -exponent(norm, cohort), sum(x.size for x in leaves)
        length = math.sqrt(sum(float(np.sum(np.square(x, dtype=np.float64))) for x in leaves)) * unit
        # Each client rounds each number and its weight by up to half a unit, and the norm in float32.
        allowed = norm * (weight + heard) / 2**most * (1 + 1e-4) + heard * math.sqrt(size) * unit
        if length > allowed:
            return f"the norm of the sum of their {' and '.join(names)} is {length:.4g}; it can be {allowed:.4g}"
    return ""


def check_method(algorithm: Algorithm, report: Tree) -> None:
    """UsageError where clients of the method tell the server more than their change, or change parts of their own."""
    if jax.tree.leaves(report):
        raise UsageError(
            "config.aggregate: secure hides single clients' changes, but clients of this method (config.method) also "
            "report to the server one by one; it needs a method without such reports"
        )
    if algorithm.held is not None and not algorithm.held_alike:
        raise UsageError(
            "config.aggregate: secure adds up whole changes, but clients of this method (config.method) are given a "
            "part of the network each, and which part would show; it needs a method without"
        )


def _fixed(x: Array, norm: float, cohort: int) -> Array:
    # A norm is kept to in float32, so a number may lie a few bits past it.
    most = np.float32(limit(cohort))
    most = most if int(most) <= limit(cohort) else np.nextafter(most, np.float32(0))
    return jnp.clip(jnp.round(x * 2.0 ** exponent(norm, cohort)), -most, most).astype(jnp.int32)


def _parts(how: Secure, change: dict) -> list[tuple[tuple[str, ...], float]]:
    """Those of a change that hold any numbers, with their norms; a part without numbers needs none."""
    found = clipping.parts(change, how.weights, how.alpha, how.stats)
    return [(names, 1.0 if norm is None else norm) for names, norm in found]


def _check(how: Secure, change: dict) -> None:
    for names, norm in clipping.parts(change, how.weights, how.alpha, how.stats):
        if norm is None and jax.tree.leaves([change[name] for name in names]):
            raise UsageError(
                f"config.aggregate: secure needs a norm for the {WORDS[names[0]]} that this method sends, as the "
                f"{PLACES[names[0]]} number of clip:C:C_ALPHA:C_STATS"
            )
    for path, x in jax.tree_util.tree_leaves_with_path(change):
        if x.dtype != jnp.float32:
            name = jax.tree_util.keystr(path)
            raise UsageError(f"config.aggregate: secure adds float32 numbers up, but a change's {name} is {x.dtype}")


def _heard(weight: Array) -> Array:
    return (weight > 0).astype(jnp.float32)
