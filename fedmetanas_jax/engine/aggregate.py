"""How the changes of a cohort become one: a chain of stages, from `config.aggregate`.

    mean                                the weighted mean (Eq. 3), and nothing else
    finite:10,clip:5:1,mean             leave out what is not finite, clip the rest, then the mean

A stage is (change, weight, key) -> (change, weight, metrics): leaves [cohort, ...] and [cohort]. A stage before the
mean hands on changes as it got them, one a client; the mean takes the cohort's axis away, and a stage after it sees
the one change that is left. Weight 0 leaves a client out: the engine then keeps what that client held. metrics are
named numbers, [cohort] or [], for the round's record.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedmetanas_jax import tree
from fedmetanas_jax.core import Aggregate, Array, Tree


def mean() -> Aggregate:
    """The weighted mean of the changes: sum n_k change_k / sum n_k."""
    return Aggregate(lambda change, weight, key: (tree.weighted_mean(change, weight), weight, {}))


def finite(allowed: int) -> Aggregate:
    """Leaves out replies that are not finite: change and weight 0. A run stops at the first beyond `allowed` of them.

    The engine marks a reply by a weight that is NaN, since what a client keeps, its report and its metrics may be
    what is not finite. ValueError for an `allowed` below 1.
    """
    if allowed < 1:
        raise ValueError(f"finite:{allowed}: replies that may be left out in a run; it must be at least 1")

    def apply(change: Tree, weight: Array, key: Array):
        good = jnp.isfinite(weight)
        kept = jax.tree.map(lambda x: jnp.where(_beside(good, x), x, 0), change)
        return kept, jnp.where(good, weight, 0.0), {}

    return Aggregate(apply, leaves_out=True, allowed=allowed)


def clip(weights: float, alpha: float | None = None, stats: float | None = None) -> Aggregate:
    """Scales a client's change down to these Euclidean norms: of the weights (all parts but the other two together),
    of the architecture parameters, of the batch-norm statistics; None leaves a part as it is.

    Metric "clipped" [cohort]: 1 where something was scaled. ValueError for a norm that is not positive.
    """
    for norm in (weights, alpha, stats):
        if norm is not None and not norm > 0:
            raise ValueError(f"clip:{norm}: a norm to clip to must be positive")

    most = {"alpha": alpha, "stats": stats}

    def one(change: dict) -> tuple[dict, Array]:
        scaled, clipped = dict(change), jnp.array(False)
        parts = [((name,), most[name]) for name in most if name in change]
        for names, norm in [(tuple(name for name in change if name not in most), weights), *parts]:
            if norm is not None:
                part = {name: change[name] for name in names}
                length = tree.global_norm(part)
                scaled |= tree.scale(part, norm / jnp.maximum(length, norm))
                clipped |= length > norm
        return scaled, clipped

    def apply(change: Tree, weight: Array, key: Array):
        change, clipped = jax.vmap(one)(change)
        return change, weight, {"clipped": clipped.astype(jnp.float32)}

    return Aggregate(apply)


def chain(*stages: Aggregate) -> Aggregate:
    """The stages one after another, each with a key of its own. ValueError where two name a metric alike."""

    def apply(change: Tree, weight: Array, key: Array):
        metrics: dict = {}
        for n, stage in enumerate(stages):
            change, weight, more = stage.apply(change, weight, jax.random.fold_in(key, n))
            if twice := sorted(metrics.keys() & more.keys()):
                raise ValueError(f"two stages of the aggregate have a metric called {twice[0]}")
            metrics |= more
        return change, weight, metrics

    leaves_out = any(stage.leaves_out for stage in stages)
    return Aggregate(apply, leaves_out, max((stage.allowed for stage in stages), default=0))


STAGES: dict[str, Callable[..., Aggregate]] = {"mean": mean, "finite": finite, "clip": clip}
NUMBERS = {"mean": (), "finite": (int,), "clip": (float, float, float)}  # of each stage; clip may have fewer
REDUCING = ("mean",)  # the stages that make one change of the cohort's


def parse(text: str) -> Aggregate:
    """The chain that `text` names: stages with commas between, a stage's numbers after colons ("clip:5:1").

    ValueError says which stage is wrong and what there is.
    """
    stages, names = [], []
    for item in text.split(","):
        name, *numbers = item.strip().split(":")
        if name not in STAGES:
            raise ValueError(f"aggregate={text!r}: no stage {name!r}; there are {', '.join(STAGES)}")
        kinds = NUMBERS[name]
        if len(numbers) > len(kinds) or (kinds and not numbers):
            raise ValueError(f"aggregate={text!r}: {name} takes {_wanted(name)}")
        try:
            values = [kind(number) for kind, number in zip(kinds, numbers, strict=False)]
            stages.append(STAGES[name](*values))
        except ValueError as error:
            raise ValueError(f"aggregate={text!r}: {name} takes {_wanted(name)} ({error})") from None
        names.append(name)
    if twice := sorted({name for name in names if names.count(name) > 1} - set(REDUCING)):
        raise ValueError(f"aggregate={text!r}: {twice[0]} stands there twice; each stage may come once")
    if sum(name in REDUCING for name in names) != 1:
        raise ValueError(f"aggregate={text!r}: exactly one stage must be {' or '.join(REDUCING)}; it makes one of many")
    if names[-1] not in REDUCING:  # these stages read one change a client
        raise ValueError(f"aggregate={text!r}: {names[-1]} comes after the mean, where no client's change is left")
    return chain(*stages)


def _wanted(name: str) -> str:
    return {
        "mean": "no numbers",
        "finite": "the replies that may be left out in the whole run, as in finite:10",
        "clip": "the largest norm of the weights' change, then of alphas and statistics, as in clip:5 or clip:5:1:10",
    }[name]


def _beside(values: Array, x: Array) -> Array:
    """[cohort] made to multiply x [cohort, ...]."""
    return values.reshape(-1, *[1] * (x.ndim - 1))
