"""What the rounds of a private run have given away so far: epsilon at a delta, by the library dp-accounting.

Two federations are neighbours where one client's data differ (replace one; that K clients take part is public). A
clipped change of norm C can then move the sum by 2 C, so noise of standard deviation Z C has the multiplier Z / 2 of
this relation; p parts of a change that are hidden apart are p Gaussian mechanisms on the same data, together one of
multiplier Z / (2 sqrt(p)). A cohort is S of K clients, drawn without replacement: RDP of Wang, Balle and
Kasiviswanathan, Subsampled Renyi Differential Privacy, AISTATS 2019. That bound is loose where S is a large share of K,
so the exact one of the Gaussian mechanism without any sampling (Balle and Wang, ICML 2018) is taken where it is less;
both hold, since drawing a cohort cannot give away more.
"""

import importlib
import math
from collections import Counter
from collections.abc import Sequence
from types import ModuleType

from fedmetanas_jax.core import Noise
from fedmetanas_jax.options import UsageError


def library() -> ModuleType:
    """dp_accounting. UsageError where it is not installed."""
    try:
        return importlib.import_module("dp_accounting")
    except ImportError:
        raise UsageError(
            "config.aggregate: gaussian needs the package dp-accounting to say what it protects: "
            "pip install 'fedmetanas_jax[privacy]'"
        ) from None


class Account:
    """The rounds that spent privacy, by how many parts of a change had noise in them."""

    def __init__(self, noise: Noise, clients: int, cohort: int):
        self.noise, self.clients, self.cohort = noise, clients, cohort
        self.delta = 1 / clients if noise.delta is None else noise.delta
        self.rounds: Counter[int] = Counter()

    def add(self, noised_parts: Sequence[float]) -> None:
        """Counts further rounds, by what their records have under this name."""
        self.rounds.update(map(int, noised_parts))

    def spent(self, done: int) -> dict[str, float]:
        """{"epsilon", "delta"} after `done` rounds; epsilon is infinite without noise. AssertionError unless each of
        them was counted, since what is missing would look like privacy."""
        assert self.rounds.total() == done, f"{self.rounds.total()} of {done} rounds are in the account"
        found = epsilon(self.noise.multiplier, dict(self.rounds), self.clients, self.cohort, self.delta)
        return {"epsilon": found, "delta": self.delta}


def epsilon(multiplier: float, rounds: dict[int, int], clients: int, cohort: int, delta: float) -> float:
    """Of rounds {parts with noise: how many rounds}, each a cohort drawn from the clients; see above for the bounds."""
    dp = library()
    rounds = {parts: count for parts, count in rounds.items() if parts and count}
    if not rounds or multiplier == 0:
        return math.inf if rounds else 0.0
    of = {parts: multiplier / (2 * math.sqrt(parts)) for parts in rounds}
    sampled = dp.rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
    for parts, count in rounds.items():
        event = dp.SampledWithoutReplacementDpEvent(clients, cohort, dp.GaussianDpEvent(of[parts]))
        sampled.compose(event, count)
    # Gaussian mechanisms one after another are one whose inverse squared multipliers add up.
    whole = 1 / math.sqrt(sum(count / of[parts] ** 2 for parts, count in rounds.items()))
    return float(min(sampled.get_epsilon(delta), dp.get_epsilon_gaussian(whole, delta)))
