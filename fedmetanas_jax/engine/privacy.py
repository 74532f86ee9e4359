"""Differential privacy of clients: the noise, and what is refused since no noise covers it.

DP-FedAvg: McMahan, Ramage, Talwar, Zhang: Learning Differentially Private Recurrent Language Models, ICLR 2018, with a
cohort of fixed size. The server adds up changes that were clipped to norm C, adds Gaussian noise of standard deviation
Z C, and divides by the size m of the cohort, whoever was left out. docs/aggregates.md says what this protects against
and what not; the guarantee itself is computed in engine/accountant.py.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from fedmetanas_jax import tree
from fedmetanas_jax.core import Aggregate, Array, Noise, Phase, Tree
from fedmetanas_jax.options import UsageError


def gaussian(
    multiplier: float,
    delta: float | None = None,
    *,
    weights: float,
    alpha: float | None = None,
    stats: float | None = None,
) -> Aggregate:
    """The mean of changes that were clipped to these norms, every client alike, with Gaussian noise.

    The parts of a change are hidden apart, each in noise in proportion to its own norm: standard deviation
    multiplier x norm / cohort of every number. Without a norm for the batch-norm statistics these are kept out: their
    change is 0. Metric "noised_parts" []: how many parts had noise, for the accountant.
    ValueError for a multiplier below 0 or a delta that is not between 0 and 1; UsageError, where it is applied, for
    architecture parameters without a norm, and for statistics without one that are more than a batch norm's, since
    nothing else could bring those up to date.
    """
    if not 0 <= multiplier < math.inf:
        raise ValueError(f"gaussian:{multiplier:g}: the noise multiplier must be 0 or more, and finite")
    if delta is not None and not 0 < delta < 1:
        raise ValueError(f"gaussian:{multiplier:g}:{delta:g}: delta must be above 0 and below 1")

    def apply(change: dict, weight: Array, key: Array):
        if "alpha" in change and alpha is None:
            raise UsageError(
                "config.aggregate: gaussian needs a norm for the architecture parameters that this method sends, as "
                "the second number of clip:C:C_ALPHA"
            )
        if stats is None and (further := _no_moments(change.get("stats", {}))):
            raise UsageError(
                f"config.aggregate: gaussian keeps statistics out unless they have a norm, but this method decides by "
                f"some of them ({', '.join(further)}); give it as the third number of clip:C:C_ALPHA:C_STATS"
            )
        size = len(weight)
        norms = {name: {"alpha": alpha, "stats": stats}.get(name, weights) for name in change}
        noise = {name: 0.0 if norm is None else multiplier * norm / size for name, norm in norms.items()}
        merged = {}
        for place, (name, part) in enumerate(sorted(change.items())):
            mean = jax.tree.map(lambda x: jnp.sum(x, axis=0) / size, part)
            hidden = _add_noise(mean, noise[name], jax.random.fold_in(key, place))
            merged[name] = tree.zeros_like(mean) if norms[name] is None else hidden
        parts = len({name if name in ("alpha", "stats") else "weights" for name, x in norms.items() if x is not None})
        return merged, weight, {"noised_parts": jnp.float32(parts)}

    return Aggregate(apply, noise=Noise(multiplier, delta, stats is not None))


def _no_moments(stats: Tree) -> list[str]:
    """The names, at the top, of statistics that are neither the mean nor the variance of a batch norm."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(stats)]
    return sorted({path[0].key for path in paths if path[-1].key not in ("mean", "var")})


def _add_noise(mean: Tree, deviation: float, key: Array) -> Tree:
    flat, like = ravel_pytree(mean)  # one draw for all leaves: many small ones compile slowly
    return like(flat + deviation * jax.random.normal(key, flat.shape, flat.dtype))


def plausible(server: Tree) -> Tree:
    """The server with no variance of a batch norm below 0, where noise may have put it. Whatever is made of noisy
    numbers alone is as private as they are."""

    def of(path: tuple, x: Array) -> Array:
        return jnp.maximum(x, 0) if path and getattr(path[-1], "key", None) == "var" else x

    return jax.tree_util.tree_map_with_path(of, server)


def check_report(report: Tree) -> None:
    """UsageError where clients tell the server more than their change."""
    if jax.tree.leaves(report):
        raise UsageError(
            "config.aggregate: gaussian hides the changes alone, but clients of this method (config.method) also "
            "report to the server one by one; it needs a method without such reports"
        )


def check_run(noise: Noise, phases: Sequence[Phase], bn_eval: str) -> None:
    """UsageError where something in the run would read clients' images past the noise and show in what it delivers."""
    if bn_eval == "recalibrated":
        raise UsageError(
            "config.bn_eval is recalibrated, which takes statistics of clients' training images into the network; "
            "with gaussian in config.aggregate it must be running or batch"
        )
    if bn_eval == "running" and not noise.stats:
        raise UsageError(
            "config.bn_eval is running, but gaussian keeps batch-norm statistics out unless they have a norm; give it "
            "as the third number of clip:C:C_ALPHA:C_STATS in config.aggregate, or use config.bn_eval=batch"
        )
    if any(phase.tolerance is not None for phase in phases):
        raise UsageError(
            "config.options.prune_tolerance decides by clients' training images whether to prune, which no noise "
            "covers; with gaussian in config.aggregate it must be none"
        )
