"""What changes over a search: the temperature, the logits' rate, when the server prunes and how much may live.

All times are shares of the run, so that 60, 300 and 1,000 rounds have the same shape. The paper's are the threshold
on noise-free weights and Gumbel noise at a falling temperature (section 4.4); the warm-up is DARTS's and MetaNAS's.
The travel rule and the line, by which a search ends in a discrete network whatever its length, are ours (D-9, D-12 to
D-14): where logits have no time to learn, thresholds alone leave most operations to the last event.
"""

from collections.abc import Callable

import jax.numpy as jnp

from fedmetanas_jax.core import Array


def linear(start: float, end: float, until: float) -> Callable[[Array], Array]:
    """share [] of the run -> `start` at 0, `end` from the share `until` on, a straight line between them."""
    return lambda share: start + (end - start) * jnp.clip(share / until, 0.0, 1.0)


def exponential(start: float, end: float, until: float) -> Callable[[Array], Array]:
    """As `linear`, but by an equal factor in equal times: a linear fall spends half its time where nothing is small."""
    return lambda share: start * (end / start) ** jnp.clip(share / until, 0.0, 1.0)


SHAPES = {"linear": linear, "exponential": exponential}


def events(rounds: int, since: float, until: float, count: int) -> list[int]:
    """The rounds before which the server prunes: `count` of them at equal distances from the share `since` of the run
    to the share `until`, where the last one is.

    Never before round 0, where nothing has been searched, nor after the last round, and at most one before a round.
    """
    shares = [until - (until - since) * i / max(count - 1, 1) for i in range(count)]
    return sorted({t for t in (round(share * rounds) for share in shares) if 0 < t < rounds})


def alive_at(first: int, last: int, share: float) -> int:
    """How many may live at a share of the pruning: the line from `first` at 0 to `last` at 1."""
    return round(first + (last - first) * min(max(share, 0.0), 1.0))


def travel_rate(travel: float, rounds: float, steps: Array) -> Array:
    """The rate of Adam at which a logit that always moves one way goes `travel` far in `rounds` rounds of `steps` [].

    Adam's step is about its rate, whatever the gradient: a fixed rate would move logits ten times as far in ten times
    the rounds. 8 in the 540 rounds of 45 steps of the paper-sized search is 3.3e-4, DARTS's rate. The steps are a
    client's own, so that logits go as far where clients are of unequal size: by the steps of the largest, the mean of
    the changes would fall short.
    """
    return travel / jnp.maximum(rounds * steps, 1.0)
