"""How the changes of a cohort become one: a chain of stages, from `config.aggregate`.

    mean                                the weighted mean (Eq. 3), and nothing else
    finite:10,clip:5:1,mean             leave out what is not finite, clip the rest, then the mean
    median, trimmed:0.2                 in place of the mean (engine/robust.py)
    clip:5:1,gaussian:1                 differential privacy: the mean of clipped changes with noise (engine/privacy.py)
    clip:5:1:10,secure                  the mean by a sum of integers, of which a server need see no summand (secure.py)

A stage is (change, weight, key) -> (change, weight, metrics): leaves [cohort, ...] and [cohort]. A stage before the
reducing one hands on changes as it got them, one a client; the reducing one takes the cohort's axis away, and a stage
after it sees the one change that is left. Weight 0 leaves a client out: the engine then keeps what that client held.
metrics are named numbers, [cohort] or [], for the round's record. docs/aggregates.md says what each is good for.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedmetanas_jax import tree
from fedmetanas_jax.core import Aggregate, Algorithm, Array, Tree
from fedmetanas_jax.engine import privacy, robust
from fedmetanas_jax.engine import secure as secure_sums
from fedmetanas_jax.engine.clipping import clip
from fedmetanas_jax.options import LARGEST_INT, UsageError


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

    return Aggregate(
        apply,
        leaves_out=any(stage.leaves_out for stage in stages),
        allowed=max((stage.allowed for stage in stages), default=0),
        by_rank=any(stage.by_rank for stage in stages),
        noise=next((stage.noise for stage in stages if stage.noise is not None), None),
    )


def check(aggregate: Aggregate, algorithm: Algorithm, report: Tree) -> None:
    """UsageError where the aggregate is wrong for this method, whose clients report this beside their change."""
    if aggregate.by_rank and algorithm.held is not None and not algorithm.held_alike:
        raise UsageError(
            "config.aggregate: median and trimmed rank what all clients learnt, but clients of this method "
            "(config.method) are given a part of the network each, and count as 0 elsewhere; use mean, with clip"
        )
    if aggregate.noise is not None:
        privacy.check_report(report)
    if aggregate.secure is not None:
        secure_sums.check_method(algorithm, report)


REDUCING: dict[str, Callable[..., Aggregate]] = {"mean": mean, "median": robust.median, "trimmed": robust.trimmed}
STAGES: dict[str, Callable[..., Aggregate]] = REDUCING | {"finite": finite, "clip": clip}
# Of each stage the numbers' types, and how many it must have.
NUMBERS = {
    "mean": ((), 0),
    "median": ((), 0),
    "trimmed": ((float,), 1),
    "gaussian": ((float, float), 1),
    "secure": ((), 0),
    "finite": ((int,), 1),
    "clip": ((float, float, float), 1),
}


def parse(text: str) -> Aggregate:
    """The chain that `text` names: stages with commas between, a stage's numbers after colons ("clip:5:1").

    ValueError says which stage is wrong and what there is.
    """
    named = [(name, _numbers(text, name, numbers)) for name, *numbers in (item.split(":") for item in _items(text))]
    names = [name for name, _ in named]
    reducing = (*REDUCING, "gaussian", "secure")
    if twice := sorted({name for name in names if names.count(name) > 1} - set(reducing)):
        raise ValueError(f"aggregate={text!r}: {twice[0]} stands there twice; each stage may come once")
    if sum(name in reducing for name in names) != 1:
        there = f"{', '.join(reducing[:-1])} or {reducing[-1]}"
        raise ValueError(f"aggregate={text!r}: exactly one stage must be {there}; it makes one of many")
    if names[-1] not in reducing:  # these stages read one change a client
        last = next(name for name in names if name in reducing)
        raise ValueError(f"aggregate={text!r}: {names[-1]} comes after the {last}, where no client's change is left")
    if names[-1] == "gaussian":
        return _private(text, named)
    if names[-1] == "secure":
        return _secure(text, named)
    return chain(*(_made(text, STAGES[name], name, numbers) for name, numbers in named))


def _private(text: str, named: list[tuple[str, list]]) -> Aggregate:
    """Clipping and noise, which are one mechanism: the noise is measured by the norms. What is not finite counts as no
    change, however often it comes, since a run that stopped there would tell of that client."""
    if [name for name, _ in named] != ["clip", "gaussian"]:
        raise ValueError(f"aggregate={text!r}: gaussian takes clip alone before it, as in clip:5:1:10,gaussian:1")
    (_, norms), (_, numbers) = named
    measured = dict(zip(("weights", "alpha", "stats"), norms, strict=False))
    clipped = _made(text, clip, "clip", norms)
    noisy = _made(text, lambda *given: privacy.gaussian(*given, **measured), "gaussian", numbers)
    return chain(finite(LARGEST_INT), clipped, noisy)


def _secure(text: str, named: list[tuple[str, list]]) -> Aggregate:
    """Clipping and adding up, which are one: how finely numbers are added follows from the norms, and a client that is
    not to be seen must clip for itself."""
    if [name for name, _ in named] != ["clip", "secure"]:
        raise ValueError(f"aggregate={text!r}: secure takes clip alone before it, as in clip:5:1:10,secure")
    return _made(text, secure_sums.secure, "clip", named[0][1])


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",")]


def _numbers(text: str, name: str, numbers: list[str]) -> list:
    if name not in NUMBERS:
        raise ValueError(f"aggregate={text!r}: no stage {name!r}; there are {', '.join(NUMBERS)}")
    kinds, least = NUMBERS[name]
    if not least <= len(numbers) <= len(kinds):
        raise ValueError(f"aggregate={text!r}: {name} takes {WANTED[name]}")
    return _made(text, lambda *given: [kind(x) for kind, x in zip(kinds, given, strict=False)], name, numbers)


def _made(text: str, make: Callable, name: str, numbers: list):
    try:
        return make(*numbers)
    except ValueError as error:
        raise ValueError(f"aggregate={text!r}: {name} takes {WANTED[name]} ({error})") from None


WANTED = {
    "mean": "no numbers",
    "median": "no numbers",
    "trimmed": "the share of the clients to trim on either side, above 0 and below 0.5, as in trimmed:0.2",
    "gaussian": "the noise multiplier, 0 or more, and a delta if it is not to be 1 / clients, as in gaussian:1:1e-5",
    "secure": "no numbers",
    "finite": "the replies that may be left out in the whole run, as in finite:10",
    "clip": "the largest norm of the weights' change, then of alphas and statistics, as in clip:5 or clip:5:1:10",
}


def _beside(values: Array, x: Array) -> Array:
    """[cohort] made to multiply x [cohort, ...]."""
    return values.reshape(-1, *[1] * (x.ndim - 1))
