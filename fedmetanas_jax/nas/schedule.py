"""What changes over a search: the temperature, and when the server prunes (D-9, D-13). Shares are of all rounds."""

from collections.abc import Callable

import jax.numpy as jnp

from fedmetanas_jax.core import Array


def linear(start: float, end: float, until: float) -> Callable[[Array], Array]:
    """share [] of the run -> `start` at 0, `end` from the share `until` on, a straight line between them."""
    return lambda share: start + (end - start) * jnp.clip(share / until, 0.0, 1.0)


def events(rounds: int, since: float, until: float, every: int) -> list[int]:
    """The rounds before which the server prunes: from the share `since` of the run, every so many rounds, to `until`.

    The share `until` itself has the last one. Never before round 0, where nothing has been searched, nor after
    the last round.
    """
    last = round(until * rounds)
    return [t for t in sorted({*range(round(since * rounds), last, every), last}) if 0 < t < rounds]
